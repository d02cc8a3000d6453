"""Serves the port of the last argument as the first argument says.

reserves: the main process binds the port and never listens; a child has a listener of its own
program:  has a program choose among its listeners (SO_ATTACH_REUSEPORT_CBPF), always the first one, again and again
"""
import ctypes
import os
import signal
import socket
import struct
import sys

SO_ATTACH_REUSEPORT_CBPF = 51
what, address = sys.argv[1], ('127.0.0.1', int(sys.argv[2]))


def new():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return s


def sharing():
    s = new()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return s


def answer(connection):
    body = 'pid={} generation={} slot={}\n'.format(
        os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))
    try:
        connection.setblocking(True)
        connection.settimeout(5)
        connection.recv(65536)
        connection.sendall('HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}'.format(
            len(body), body).encode())
    except OSError:
        pass
    connection.close()


def serve(listener):
    while True:
        answer(listener.accept()[0])


if what == 'reserves':
    reserved = sharing()
    reserved.bind(address)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        listener = sharing()
        listener.bind(address)
        listener.listen(1024)
        serve(listener)

    def stop(*_):
        os.kill(child, signal.SIGINT)
        os._exit(0)
    signal.signal(signal.SIGINT, stop)
    os.wait()
elif what == 'program':
    listener = sharing()
    listener.bind(address)
    listener.listen(1024)
    first = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0))
    while True:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF,
                            struct.pack('=HxxxxxxQ', 1, ctypes.addressof(first)))
        answer(listener.accept()[0])
