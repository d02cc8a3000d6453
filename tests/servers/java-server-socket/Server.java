import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.ServerSocket;
import java.net.Socket;

public class Server {
    static final String BODY = "pid=" + ProcessHandle.current().pid()
        + " generation=" + System.getenv("REUSE_RUN_GENERATION") + "\n";

    public static void main(String[] args) throws IOException {
        ServerSocket server = new ServerSocket(Integer.parseInt(System.getenv("PORT")));
        while (true) {
            Socket client = server.accept();
            new Thread(() -> serve(client)).start();
        }
    }

    static void serve(Socket client) {
        try (client) {
            BufferedReader reader = new BufferedReader(new InputStreamReader(client.getInputStream()));
            for (String line; (line = reader.readLine()) != null && !line.isEmpty();) {
            }
            client.getOutputStream().write(("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: "
                + BODY.length() + "\r\n\r\n" + BODY).getBytes());
        } catch (IOException e) {
            e.printStackTrace();
        }
    }
}
