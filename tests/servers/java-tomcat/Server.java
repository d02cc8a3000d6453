import jakarta.servlet.http.HttpServlet;
import jakarta.servlet.http.HttpServletRequest;
import jakarta.servlet.http.HttpServletResponse;
import java.io.IOException;
import org.apache.catalina.startup.Tomcat;

/** Embedded as in Spring Boot: a servlet, and the connector that Tomcat has by default. */
public class Server {
    static final String BODY = "pid=" + ProcessHandle.current().pid() + " generation="
        + System.getenv("REUSE_RUN_GENERATION") + "\n";

    public static void main(String[] args) throws Exception {
        var tomcat = new Tomcat();
        tomcat.setBaseDir(System.getenv("BUILD"));
        tomcat.setPort(Integer.parseInt(System.getenv("PORT")));
        var context = tomcat.addContext("", null);
        var answer = Tomcat.addServlet(context, "answer", new HttpServlet() {
            @Override
            protected void doGet(HttpServletRequest request, HttpServletResponse response) throws IOException {
                response.getOutputStream().print(BODY);
            }
        });
        answer.addMapping("/");
        tomcat.getConnector();
        tomcat.start();
        tomcat.getServer().await();
    }
}
