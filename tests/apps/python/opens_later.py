"""A server on the port of the first argument. SIGUSR1 opens one more port, SIGALRM closes it."""
import http.server, signal, socket, sys

more = []


def opens(*_):
    more.append(socket.create_server(("127.0.0.1", int(sys.argv[1]) + 10000)))
    print("opened", flush=True)


def closes(*_):
    while more:
        more.pop().close()
    print("closed", flush=True)


signal.signal(signal.SIGUSR1, opens)
signal.signal(signal.SIGALRM, closes)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
