"""A server that speaks to NOTIFY_SOCKET (sd_notify(3)), with nothing but the standard library.

Each argument after the port is a message, with \\n for the end of a line. With BARRIER=1 goes the end of a
pipe, and nothing more is said until the other side has closed it. `uid=N` is no message: the server goes on
as that user.
"""
import os
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = 'pid={} generation={} slot={}\n'.format(
            os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT')).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def say(line):
    sys.stdout.write(line + '\n')
    sys.stdout.flush()


def notify(message, fds=()):
    address = os.environ['NOTIFY_SOCKET']
    if address.startswith('@'):
        address = '\0' + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(address)
        socket.send_fds(client, [message.encode()], list(fds))


server = ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
for argument in sys.argv[2:]:
    message = argument.replace('\\n', '\n')
    if message == 'BARRIER=1':
        barrier, its = os.pipe()
        notify(message, [its])
        os.close(its)
        say('barrier {!r}'.format(os.read(barrier, 1)))
    elif message.startswith('uid='):
        os.setgroups([])
        os.setuid(int(message[4:]))
    else:
        notify(message)
        say('said {!r}'.format(message))
server.serve_forever()
