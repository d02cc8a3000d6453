"""Another user of the machine, or a process in another namespace, that does what it may do to a reuse-run.

usage: stranger.py [--uid UID] [--user-namespace] WHAT ARGUMENTS...

--user-namespace: in a new user namespace in which each user has the same number as outside
ask NAME LINE                sends a line to an abstract socket and prints all that comes
ask-by-another NAME LINE     the same, but a process that has ended by then has connected
flood NAME                   connects again and again
listen NAME...               listens and answers with control characters
be-silent NAME...            listens and says nothing
fill NAME...                 listens, and fills the queue

In a NAME {pid} is the PID of this process.
"""
import ctypes
import os
import socket
import sys
import time
import threading


def become(uid):
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def enter_user_namespace():
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if ctypes.CDLL(None).unshare(0x10000000) != 0:  # CLONE_NEWUSER
            os._exit(1)
        os.write(ready[1], b'x')
        os.read(done[0], 1)
        return
    os.read(ready[0], 1)
    for kind in 'uid', 'gid':
        with open(f'/proc/{child}/{kind}_map', 'w') as numbers:
            numbers.write('0 0 4294967295')
    os.write(done[1], b'x')
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def read_all(connection):
    received = b''
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def say(connection, line):
    try:
        connection.sendall(line.encode() + b'\n')
    except (BrokenPipeError, ConnectionResetError):
        pass
    print('answer:', read_all(connection).decode(), flush=True)


def ask(name, line):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect('\0' + name)
    say(connection, line)


def ask_by_another(name, line):
    connection = socket.socket(socket.AF_UNIX)
    child = os.fork()
    if child == 0:
        connection.connect('\0' + name)
        os._exit(0)
    os.waitpid(child, 0)
    print('connected', flush=True)
    say(connection, line)


def flood(name):
    print('floods', flush=True)
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect('\0' + name)
                connection.sendall(b'x' * 100)
        except OSError:
            pass


def listen(*names):
    listeners = [socket.socket(socket.AF_UNIX) for _ in names]
    for listener, name in zip(listeners, names):
        listener.bind('\0' + name)
        listener.listen()

    def serve(listener):
        while True:
            connection, _ = listener.accept()
            try:
                connection.sendall(b'{"failed":["\\u001b[2Jimpostor\\u009b2J",["\\u001b[31mred"]]}\n')
                connection.recv(65536)
            except OSError:
                pass
            connection.close()
    for listener in listeners:
        threading.Thread(target=serve, args=[listener], daemon=True).start()
    print('listens', flush=True)
    while True:
        time.sleep(0.1)


def be_silent(*names):
    listeners = [socket.socket(socket.AF_UNIX) for _ in names]
    for listener, name in zip(listeners, names):
        listener.bind('\0' + name)
        listener.listen()
    print('listens', flush=True)
    while True:
        time.sleep(0.1)


def fill(*names):
    kept = []
    for name in names:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind('\0' + name)
        listener.listen(1)
        kept.append(listener)
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.setblocking(False)
            try:
                connection.connect('\0' + name)
            except BlockingIOError:
                break
            kept.append(connection)
    print('listens', flush=True)
    while True:
        time.sleep(0.1)


arguments = [word.replace('{pid}', str(os.getpid())) for word in sys.argv[1:]]
if arguments[0] == '--uid':
    become(int(arguments[1]))
    arguments = arguments[2:]
if arguments[0] == '--user-namespace':
    enter_user_namespace()
    arguments = arguments[1:]
globals()[arguments[0].replace('-', '_')](*arguments[1:])
