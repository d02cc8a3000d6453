"""A server on the port of the first argument. SIGUSR1 opens one more port, SIGALRM closes it."""
import http.server, os, signal, socket, sys

more = []


def opens(*_):
    more.append(socket.create_server(("127.0.0.1", int(sys.argv[1]) + 10000)))
    os.write(1, b"opened\n")  # the next signal may come in the middle of a print


def closes(*_):
    while more:
        more.pop().close()
    os.write(1, b"closed\n")


signal.signal(signal.SIGUSR1, opens)
signal.signal(signal.SIGALRM, closes)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
