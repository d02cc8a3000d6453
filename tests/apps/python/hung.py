"""hung.py WHAT FOLDER FILE: says that it is ready, and once FOLDER/go exists makes a system call whose argument is in a file system
that doesn't answer: in the memory of a mapped FILE, or the path FILE itself. With `early` in WHAT it isn't ready before.
Prints `waits` in the beginning, `calls` before the call and `returns` after it. With `serve` it has bound FILE before, and
listens instead of the call."""
import ctypes
import mmap
import os
import socket
import sys
import time

what, folder, path = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
address = 0
if 'path' not in what:
    fd = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
tcp = socket.socket()
if 'serve' in what:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
print('waits', flush=True)
if 'early' not in what:
    os.write(int(os.environ['READY_FD']), b'\n')
while not os.path.exists(os.path.join(folder, 'go')):
    time.sleep(0.01)
print('calls', flush=True)
if 'serve' in what:
    listener.listen()
elif 'bind-path' in what:
    unix = socket.socket(socket.AF_UNIX)
    name = path.encode() + b'\0'
    sockaddr = ctypes.create_string_buffer(b'\1\0' + name)
    libc.bind(unix.fileno(), sockaddr, len(name) + 2)
elif 'bind' in what:
    libc.bind(tcp.fileno(), ctypes.c_void_p(address), 16)
elif 'option' in what:
    libc.setsockopt(tcp.fileno(), socket.SOL_SOCKET, socket.SO_REUSEPORT, ctypes.c_void_p(address), 4)
elif 'unlink-path' in what:
    libc.unlink(path.encode())
elif 'unlink' in what:
    libc.unlink(ctypes.c_void_p(address))
print('returns', flush=True)
os.write(int(os.environ['READY_FD']), b'\n')
time.sleep(600)
