"""hung_fs.py FOLDER [WHAT]: mounts a file system on FOLDER and prints `mounted`. It has a script named `file`, which runs its arguments,
a file named `env`, and a folder named `folder` for sockets. After SIGUSR1 (it prints `hangs`) it answers no request any more, or
none to WHAT: `mknod`, `unlink` or `rename`. None can be interrupted: SIGKILL doesn't
end a process that waits. The file system goes away with this program, and all that waits for it gets an error. Needs root
and /dev/fuse."""
import ctypes
import errno
import os
import select
import signal
import struct
import sys

LOOKUP, FORGET, GETATTR, SETATTR, MKNOD, UNLINK, RENAME = 1, 2, 3, 4, 8, 10, 12
OPEN, READ, STATFS, RELEASE, INIT, OPENDIR, ACCESS = 14, 15, 17, 18, 26, 27, 34
SIZE = 4096
TEXTS = {2: b'#!/bin/sh\nexec "$@"\n', 4: b'NAME=value\n'}
names = {1: {b'file': 2, b'folder': 3, b'env': 4}, 3: {}}
new = 5

folder, *what = sys.argv[1:]
deaf_to = {'mknod': MKNOD, 'unlink': UNLINK, 'rename': RENAME}[what[0]] if what else None
libc = ctypes.CDLL(None, use_errno=True)
fuse = os.open('/dev/fuse', os.O_RDWR)
options = 'fd={},rootmode=40755,user_id=0,group_id=0,allow_other'.format(fuse)
if libc.mount(b'hung', folder.encode(), b'fuse', 0, options.encode()) != 0:
    raise OSError(ctypes.get_errno(), 'mount')
hangs = False


def begin_to_hang(*_):
    global hangs
    hangs = True
    os.write(1, b'hangs\n')  # the signal may come in the middle of a print


# Python calls a handler when a system call ends. With this pipe a signal that comes just before select ends it too.
wake, waker = os.pipe()
os.set_blocking(waker, False)
signal.set_wakeup_fd(waker)
signal.signal(signal.SIGUSR1, begin_to_hang)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def attributes(inode):
    mode = {1: 0o40755, 2: 0o100755, 3: 0o40755, 4: 0o100600}.get(inode, 0o140755)
    size = SIZE if inode in TEXTS else 0
    return struct.pack('<QQQQQQIIIIIIIIII', inode, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def reply(unique, body=b'', error=0):
    try:
        os.write(fuse, struct.pack('<IiQ', 16 + len(body), -error, unique) + body)
    except OSError:
        pass  # interrupted meanwhile


def entry(inode):
    return struct.pack('<QQQQII', inode, 0, 0, 0, 0, 0) + attributes(inode)


def answer(opcode, unique, node, body):
    global new
    if opcode == INIT:
        _, _, readahead, _ = struct.unpack('<IIII', body[:16])
        reply(unique, struct.pack('<IIIIHHIIHHIIHIIHHI4x', 7, 31, readahead, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)[:64].ljust(64, b'\0'))
    elif opcode == LOOKUP:
        inode = names[node].get(body.split(b'\0')[0])
        if inode is None:
            reply(unique, error=errno.ENOENT)
        else:
            reply(unique, entry(inode))
    elif opcode == MKNOD:
        names[node][body[16:].split(b'\0')[0]] = new
        reply(unique, entry(new))
        new += 1
    elif opcode == UNLINK:
        names[node].pop(body.split(b'\0')[0])
        reply(unique)
    elif opcode == RENAME:
        old, name = body[8:].split(b'\0')[:2]
        names[node][name] = names[node].pop(old)
        reply(unique)
    elif opcode in (GETATTR, SETATTR):
        reply(unique, struct.pack('<QII', 0, 0, 0) + attributes(node))
    elif opcode in (OPEN, OPENDIR):
        reply(unique, struct.pack('<QII', 0, 0, 0))
    elif opcode == READ:
        _, offset, size = struct.unpack('<QQI', body[:20])
        reply(unique, TEXTS[node].ljust(SIZE, b'\n')[offset:offset + size])
    elif opcode == STATFS:
        reply(unique, b'\0' * 80)
    elif opcode in (RELEASE, ACCESS):
        reply(unique)
    elif opcode != FORGET:
        reply(unique, error=errno.ENOSYS)


first = True
os.set_blocking(fuse, False)
while True:
    ready, _, _ = select.select([fuse, wake], [], [])
    if wake in ready:
        os.read(wake, 1)
        continue
    try:
        request = os.read(fuse, 1 << 18)
    except OSError as error:
        if error.errno == errno.ENODEV:
            break  # unmounted
        continue
    _, opcode, unique, node = struct.unpack('<IIQQ', request[:24])
    if not hangs or deaf_to not in (None, opcode):
        answer(opcode, unique, node, request[40:])
    if first:
        first = False
        print('mounted', flush=True)
