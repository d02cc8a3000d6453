"""Serves a port, and closes listeners while it goes on.

usage: recycles.py PORT WHAT

reopens   opens a new listener every half a second, then empties and closes the old one
children  two children listen, live for half a second or more, empty their listeners and end; each is followed by another one
threads   four threads with a listener each; at SIGUSR1 one empties its own, closes it and ends
loop      closes its listener at SIGUSR1, without EPOLL_CTL_DEL
hands     at SIGUSR1 a child gets the listener (SCM_RIGHTS) and accepts a second later; this process has closed it before
keeps     accepts one connection, closes the listener at SIGUSR1, and answers at the next SIGUSR1
moves     at SIGUSR1 the listener moves to another number, and nothing is accepted for a second
"""
import os
import select
import signal
import socket
import sys
import threading
import time

from answering import answer

port, what = int(sys.argv[1]), sys.argv[2]
own, other = os.pipe()
signal.signal(signal.SIGUSR1, lambda *_: os.write(other, b'x'))


def say(line):
    os.write(1, (line + '\n').encode())


def listen(shares=True):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(('127.0.0.1', port))
    listener.listen(1024)
    say('listens')
    return listener


def serve(listener, seconds=None, until=None):
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        wait = None if end is None else max(0, end - time.monotonic())
        ready = select.select([listener] + ([until] if until is not None else []), [], [], wait)[0]
        if until in ready:
            return
        if listener in ready:
            answer(listener.accept()[0])


def drain(listener):
    listener.setblocking(False)
    while True:
        try:
            connection = listener.accept()[0]
        except BlockingIOError:
            return
        answer(connection)


def reopens():
    old = listen()
    while True:
        serve(old, 0.5)
        new = listen()
        drain(old)
        old.close()
        old = new
        say('recycled')


def child(seconds):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        listener = listen()
        serve(listener, seconds)
        drain(listener)
        say('recycled')
        os._exit(0)


def children():
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    child(0.5)
    child(0.8)
    while True:
        os.wait()
        child(0.5)


def threads():
    def one():
        listener = listen()
        serve(listener, until=own)
        drain(listener)
        listener.close()
        say('recycled')
    threading.Thread(target=one, daemon=True).start()
    for _ in range(2):
        threading.Thread(target=lambda: serve(listen()), daemon=True).start()
    serve(listen())


def loop():
    listener = listen(shares=False)
    listener.setblocking(False)
    number, epoll = listener.fileno(), select.epoll()
    epoll.register(listener, select.EPOLLIN)
    epoll.register(own, select.EPOLLIN)
    while True:
        for ready, _ in epoll.poll():
            if ready == own:
                os.read(own, 1)
                listener.close()
                say('recycled')
            elif ready == number and listener.fileno() >= 0:
                try:
                    answer(listener.accept()[0])
                except BlockingIOError:
                    pass
            elif ready == number:
                say('woken by a closed listener')
                time.sleep(0.01)


def hands():
    ours, its = socket.socketpair()
    if os.fork() == 0:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        ours.close()
        select.select([its], [], [])
        time.sleep(1)
        (number,) = socket.recv_fds(its, 1, 1)[1]
        serve(socket.socket(fileno=number))
    listener = listen(shares=False)
    serve(listener, until=own)
    socket.send_fds(ours, [b'x'], [listener.fileno()])
    listener.close()
    say('recycled')
    while True:
        time.sleep(0.1)


def keeps():
    listener = listen(shares=False)
    connection = listener.accept()[0]
    say('accepted')
    os.read(own, 1)
    listener.close()
    say('recycled')
    os.read(own, 1)
    answer(connection)
    while True:
        time.sleep(0.1)


def moves():
    listener = listen(shares=False)
    serve(listener, until=own)
    moved = socket.socket(fileno=os.dup2(listener.fileno(), 100))
    listener.close()
    say('recycled')
    time.sleep(1)
    serve(moved)


globals()[what]()
