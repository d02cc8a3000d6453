"""Answers one connection after the other, and falls ill when it is asked to: for /loop or at SIGUSR1 it computes for ever,
for /deadlock or at SIGUSR2 it waits for a lock that it holds, and says so before; /leak makes it keep 64 MiB more. /work/SECONDS takes so long.
The address is host:port, fd:N or a path. With a file as second argument it exits with 1 at its start while that file exists."""
import os
import signal
import socket
import sys
import threading
import time

lock = threading.Lock()
kept = []


def loop(*_):
    os.write(1, f'ill {os.getpid()}.\n'.encode())
    while True:
        pass


def deadlock(*_):
    os.write(1, f'ill {os.getpid()}.\n'.encode())
    lock.acquire()
    lock.acquire()


signal.signal(signal.SIGUSR1, loop)
signal.signal(signal.SIGUSR2, deadlock)

where = sys.argv[1]
if len(sys.argv) > 2 and os.path.exists(sys.argv[2]):
    sys.exit(1)
if where.startswith('fd:'):
    listener = socket.socket(fileno=int(where[3:]))
elif where.startswith('/'):
    listener = socket.socket(socket.AF_UNIX)
    if os.path.exists(where):
        os.unlink(where)
    listener.bind(where)
    listener.listen(128)
else:
    host, port = where.rsplit(':', 1)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if '--share' in sys.argv:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, int(port)))
    listener.listen(128)

while True:
    connection, _ = listener.accept()
    with connection:
        try:
            request = connection.recv(65536).decode().split(' ')
            path = request[1] if len(request) > 1 else '/'
            if path == '/loop':
                loop()
            if path == '/deadlock':
                deadlock()
            if path == '/leak':
                kept.append(b'x' * (64 << 20))
            if path.startswith('/work/'):
                time.sleep(float(path[6:]))
            body = 'pid={} generation={} slot={}\n'.format(
                os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))
            head = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n'
            connection.sendall((head.format(len(body)) + body).encode())
        except OSError:
            pass
