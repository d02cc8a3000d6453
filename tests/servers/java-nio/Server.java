import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;

public class Server {
    public static void main(String[] args) throws IOException {
        String body = "pid=" + ProcessHandle.current().pid()
            + " generation=" + System.getenv("REUSE_RUN_GENERATION") + "\n";
        byte[] answer = ("HTTP/1.1 200 OK\r\nContent-Length: " + body.length() + "\r\n\r\n" + body).getBytes();

        Selector selector = Selector.open();
        ServerSocketChannel server = ServerSocketChannel.open();
        server.bind(new InetSocketAddress(Integer.parseInt(System.getenv("PORT"))));
        server.configureBlocking(false);
        server.register(selector, SelectionKey.OP_ACCEPT);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel client = server.accept();
                    if (client != null) {
                        client.configureBlocking(false);
                        client.register(selector, SelectionKey.OP_READ, ByteBuffer.allocate(8192));
                    }
                } else {
                    serve((SocketChannel) key.channel(), (ByteBuffer) key.attachment(), answer);
                }
            }
            selector.selectedKeys().clear();
        }
    }

    static void serve(SocketChannel client, ByteBuffer request, byte[] answer) throws IOException {
        if (client.read(request) < 0) {
            client.close();
            return;
        }
        String text = new String(request.array(), 0, request.position(), StandardCharsets.US_ASCII);
        if (!text.endsWith("\r\n\r\n")) {
            return;
        }
        request.clear();
        client.write(ByteBuffer.wrap(answer));
        if (text.toLowerCase().contains("connection: close")) {
            client.close();
        }
    }
}
