"""A server with a graceful stop: on SIGINT it accepts no more, finishes its requests and exits with 0."""
import signal
import sys
import threading
from http.server import ThreadingHTTPServer

from handler import Handler


class Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for requests in progress


server = Server(('', int(sys.argv[1])), Handler)
# shutdown() waits for serve_forever(), so it can't be called from its thread.
signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
server.server_close()
