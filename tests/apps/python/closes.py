"""Serves a port. While the file close-SLOT exists in the folder that is the second argument, its listener is closed."""
import os
import select
import socket
import sys
import time

from answering import answer

port, folder, slot = int(sys.argv[1]), sys.argv[2], os.environ.get('REUSE_RUN_SLOT')
flag = os.path.join(folder, 'close-' + str(slot))


def say(line):
    os.write(1, (line + '\n').encode())


def listen():
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(('127.0.0.1', port))
    listener.listen(64)
    return listener


def serve(listener):
    answer(listener.accept()[0])


listener = listen()
while True:
    if os.path.exists(flag):
        if listener:
            listener.close()
            listener = None
            say('closed ' + slot)
        time.sleep(0.01)
        continue
    if not listener:
        listener = listen()
        say('opened ' + slot)
    if select.select([listener], [], [], 0.01)[0]:
        serve(listener)
