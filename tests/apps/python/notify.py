"""A server that sends messages to NOTIFY_SOCKET (sd_notify(3)), with the standard library only.

Each argument after the port is a message, with \\n for the end of a line. With BARRIER=1 it sends the end of a
pipe and waits until the other side has closed that. `uid=N` is no message: the server becomes that user.
"""
import os
import socket
import sys
from http.server import ThreadingHTTPServer

from handler import Handler


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
