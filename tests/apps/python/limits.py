"""Serves the port of the last argument, on a socket with the options of the arguments before it: `device NAME`, `index N`,
`filter`, `key`, `min-ttl N`, `mark N`, before bind; `then` stands for bind, `after` for listen. `user N` becomes that user,
`shutdown` shuts the listener down at the stop signal, `namespace` enters a user namespace, `unlink PATH` and `path PATH`
remove and bind a Unix socket."""
import ctypes
import errno
import os
import signal
import socket
import struct
import sys

SO_BINDTODEVICE, SO_BINDTOIFINDEX, SO_ATTACH_FILTER, TCP_MD5SIG, IP_MINTTL, SO_MARK = 25, 62, 26, 14, 21, 36
*words, port = sys.argv[1:]
words = iter(words)
address = ('0.0.0.0', int(port))
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
bound = listening = False


def bind():
    global bound
    s.bind(address)
    bound = True


def listen():
    global listening
    bound or bind()
    s.listen(64)
    listening = True


def drop_everything():
    """A filter that lets no packet in."""
    code = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0))
    program = struct.pack('=HxxxxxxQ', 1, ctypes.addressof(code))
    s.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


for word in words:
    try:
        if word == 'device':
            s.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, next(words).encode() + b'\0')
        elif word == 'index':
            s.setsockopt(socket.SOL_SOCKET, SO_BINDTOIFINDEX, int(next(words)))
        elif word == 'filter':
            drop_everything()
        elif word == 'key':  # struct tcp_md5sig, for 127.0.0.1
            peer = struct.pack('=HH4s120x', socket.AF_INET, 0, socket.inet_aton('127.0.0.1'))
            s.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, peer + struct.pack('=BBHi', 0, 0, 3, 0) + b'key'.ljust(80, b'\0'))
        elif word == 'min-ttl':
            s.setsockopt(socket.IPPROTO_IP, IP_MINTTL, int(next(words)))
        elif word == 'mark':
            s.setsockopt(socket.SOL_SOCKET, SO_MARK, int(next(words)))
        elif word == 'shutdown':
            signal.signal(signal.SIGINT, lambda *_: (s.shutdown(socket.SHUT_RDWR), os._exit(0)))
        elif word == 'user':
            user = int(next(words))
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        elif word == 'namespace':  # a user namespace of its own, in which it has all capabilities
            if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
                raise OSError(ctypes.get_errno(), 'unshare')
        elif word == 'unlink':
            os.unlink(next(words))
            print('unlinked', flush=True)
        elif word == 'path':
            socket.socket(socket.AF_UNIX).bind(next(words))
            print('bound', flush=True)
        elif word == 'then':
            bind()
        elif word == 'after':
            listen()
    except OSError as error:
        print(word, errno.errorcode[error.errno], flush=True)
listening or listen()
print('min-ttl {} mark {}'.format(s.getsockopt(socket.IPPROTO_IP, IP_MINTTL), s.getsockopt(socket.SOL_SOCKET, SO_MARK)),
      flush=True)
while True:
    connection, _ = s.accept()
    try:
        connection.settimeout(5)
        connection.recv(65536)
        body = 'pid={} generation={} slot={} min-ttl={}\n'.format(
            os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'),
            s.getsockopt(socket.IPPROTO_IP, IP_MINTTL))
        connection.sendall('HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}'.format(
            len(body), body).encode())
    except OSError:
        pass
    connection.close()
