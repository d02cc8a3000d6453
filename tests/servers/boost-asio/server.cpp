// An HTTP server as in Boost.Asio's examples. Its acceptor is registered with epoll when it is opened, before bind.
#include <boost/asio.hpp>
#include <cstdlib>
#include <memory>
#include <set>
#include <string>
#include <unistd.h>

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

struct Connection;
static std::set<std::shared_ptr<Connection>> connections;
static bool stops;

struct Connection : std::enable_shared_from_this<Connection> {
    tcp::socket socket;
    asio::streambuf request;
    std::string answer;
    bool is_idle = true;

    explicit Connection(tcp::socket socket) : socket(std::move(socket)) {}

    void read() {
        is_idle = true;
        if (stops) return end();
        asio::async_read_until(socket, request, "\r\n\r\n", [self = shared_from_this()](error_code error, size_t length) {
            if (error) return self->end();
            self->is_idle = false;
            auto begin = asio::buffers_begin(self->request.data());
            std::string head(begin, begin + length);
            self->request.consume(length);
            self->write(head.find("onnection: close") == std::string::npos);
        });
    }

    void write(bool keeps) {
        keeps = keeps && !stops;
        std::string body =
            "pid=" + std::to_string(getpid()) + " generation=" + std::getenv("REUSE_RUN_GENERATION") + "\n";
        answer = "HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" +
                 (keeps ? "" : "Connection: close\r\n") + "\r\n" + body;
        asio::async_write(socket, asio::buffer(answer), [self = shared_from_this(), keeps](error_code error, size_t) {
            if (error || !keeps) return self->end();
            self->read();
        });
    }

    void end() {
        error_code ignored;
        socket.close(ignored);
        connections.erase(shared_from_this());
    }
};

static void accept(tcp::acceptor &acceptor) {
    acceptor.async_accept([&acceptor](error_code error, tcp::socket socket) {
        if (error) return;
        auto connection = std::make_shared<Connection>(std::move(socket));
        connections.insert(connection);
        connection->read();
        accept(acceptor);
    });
}

int main(int argc, char **) {
    asio::io_context context{1};
    tcp::acceptor acceptor(context, tcp::endpoint(asio::ip::address_v4::loopback(), std::atoi(std::getenv("PORT"))));
    accept(acceptor);
    asio::signal_set signals(context);
    if (argc > 1) {
        signals.add(SIGINT);
        signals.async_wait([&](error_code, int) {
            stops = true;
            acceptor.close();
            for (auto &connection : std::set<std::shared_ptr<Connection>>(connections))
                if (connection->is_idle) connection->end();
        });
    }
    context.run();
}
