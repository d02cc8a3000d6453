"""A server on a Unix socket as in the documentation of socketserver: it doesn't unlink the path or handle signals. With
`unix.py PATH slow` an answer waits for the file PATH.go, and a stop doesn't wait for answers."""
import os
import socketserver
import sys
import time

path, slow = sys.argv[1], sys.argv[2:] == ['slow']
body = 'pid={} generation={} slot={}\n'.format(
    os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        while self.rfile.readline().strip():
            pass
        while slow and not os.path.exists(path + '.go'):
            time.sleep(0.01)
        self.wfile.write('HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{}'.format(
            len(body), body).encode())


server = socketserver.ThreadingUnixStreamServer(path, Handler)
server.daemon_threads = slow
server.serve_forever()
