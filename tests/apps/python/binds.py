"""Binds what the first argument names, prints the results, and serves the TCP port that is the second argument.

others:    a UDP socket on the same number, a Unix socket, and a TCP socket on port 0
wildcards: the port on 0.0.0.0 and on [::], two listeners
options:   the port. Prints the socket options before and after the bind; the first generation sets some before
"""
import os
import socket
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer

from handler import Handler


class Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()


class Server4(ThreadingHTTPServer):
    def options(self):
        names = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.SOL_SOCKET, socket.SO_SNDBUF),
            (socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
        ]
        return [self.socket.getsockopt(*name) for name in names]

    def server_bind(self):
        if os.environ.get('REUSE_RUN_GENERATION') == '1':
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50000)
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 16)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1234)
        before = self.options()
        super().server_bind()
        say('options: {} before, {} after'.format(before, self.options()))


def say(line):
    sys.stdout.write(line + '\n')
    sys.stdout.flush()


what, port = sys.argv[1], int(sys.argv[2])
kept = []
servers = []
if what == 'others':
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        udp.bind(('127.0.0.1', port))
        say('udp: bound')
    except OSError:
        say('udp: in use')

    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with tempfile.TemporaryDirectory() as folder:
        unix.bind(os.path.join(folder, 'socket'))
        unix.listen()
        say('unix: bound')

    any_port = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    any_port.bind(('127.0.0.1', 0))
    any_port.listen()
    say('port 0: {}'.format(any_port.getsockname()[1]))

    kept = [udp, unix, any_port]
    servers = [ThreadingHTTPServer(('127.0.0.1', port), Handler)]
elif what == 'wildcards':
    servers = [Server6(('::', port), Handler), ThreadingHTTPServer(('0.0.0.0', port), Handler)]
elif what == 'options':
    servers = [Server4(('127.0.0.1', port), Handler)]

for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
