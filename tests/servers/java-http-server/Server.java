import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

public class Server {
    public static void main(String[] args) throws IOException {
        String body = "pid=" + ProcessHandle.current().pid()
            + " generation=" + System.getenv("REUSE_RUN_GENERATION") + "\n";
        int port = Integer.parseInt(System.getenv("PORT"));
        HttpServer server = HttpServer.create(new InetSocketAddress(port), 0);
        server.createContext("/", exchange -> {
            exchange.sendResponseHeaders(200, body.length());
            exchange.getResponseBody().write(body.getBytes());
            exchange.close();
        });
        server.setExecutor(Executors.newCachedThreadPool());
        if (args.length > 0) {
            Runtime.getRuntime().addShutdownHook(new Thread(() -> server.stop(1)));
        }
        server.start();
    }
}
