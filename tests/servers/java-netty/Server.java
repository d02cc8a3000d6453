import io.netty.bootstrap.ServerBootstrap;
import io.netty.buffer.Unpooled;
import io.netty.channel.Channel;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInitializer;
import io.netty.channel.SimpleChannelInboundHandler;
import io.netty.channel.epoll.EpollEventLoopGroup;
import io.netty.channel.epoll.EpollServerSocketChannel;
import io.netty.channel.socket.SocketChannel;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpObjectAggregator;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpServerCodec;
import io.netty.handler.codec.http.HttpServerKeepAliveHandler;
import io.netty.handler.codec.http.HttpVersion;
import java.net.InetSocketAddress;
import java.nio.charset.StandardCharsets;

/** An HTTP server as in Netty's examples. Its listener is registered with epoll when it is made, before bind. */
public class Server {
    static final byte[] BODY = ("pid=" + ProcessHandle.current().pid() + " generation="
        + System.getenv("REUSE_RUN_GENERATION") + "\n").getBytes(StandardCharsets.UTF_8);

    static class Handler extends SimpleChannelInboundHandler<FullHttpRequest> {
        @Override
        protected void channelRead0(ChannelHandlerContext context, FullHttpRequest request) {
            var answer = new DefaultFullHttpResponse(
                HttpVersion.HTTP_1_1, HttpResponseStatus.OK, Unpooled.wrappedBuffer(BODY));
            answer.headers().setInt(HttpHeaderNames.CONTENT_LENGTH, BODY.length);
            context.writeAndFlush(answer);
        }
    }

    public static void main(String[] args) throws Exception {
        var group = new EpollEventLoopGroup(2);
        var initializer = new ChannelInitializer<SocketChannel>() {
            @Override
            protected void initChannel(SocketChannel channel) {
                channel.pipeline().addLast(
                    new HttpServerCodec(), new HttpServerKeepAliveHandler(), new HttpObjectAggregator(65536), new Handler());
            }
        };
        Channel listener = new ServerBootstrap().group(group).channel(EpollServerSocketChannel.class)
            .childHandler(initializer)
            .bind(new InetSocketAddress("127.0.0.1", Integer.parseInt(System.getenv("PORT")))).sync().channel();
        if (args.length > 0) {
            Runtime.getRuntime().addShutdownHook(new Thread(() -> {
                listener.close().syncUninterruptibly();
                group.shutdownGracefully().syncUninterruptibly();
            }));
        }
        listener.closeFuture().sync();
    }
}
