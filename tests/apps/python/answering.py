"""Answers one request, for the servers beside this file."""
import os


def answer(connection):
    try:
        connection.settimeout(5)
        connection.recv(65536)
        body = 'pid={} generation={} slot={}\n'.format(
            os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))
        head = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n'.format(len(body))
        connection.sendall((head + body).encode())
    except OSError:
        pass
    connection.close()
