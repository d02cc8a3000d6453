"""Makes unusual calls of bind, listen and setsockopt and prints their results. The arguments are three free ports.
It must print the same with and without reuse-run."""
import ctypes
import errno
import os
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.bind.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
libc.listen.argtypes = [ctypes.c_int, ctypes.c_int]
libc.setsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
port, other, third = map(int, sys.argv[1:4])


def say(what, result):
    outcome = 'ok' if result == 0 else errno.errorcode.get(ctypes.get_errno(), ctypes.get_errno())
    os.write(1, '{}: {}\n'.format(what, outcome).encode())


def ipv4(number, ip='127.0.0.1', family=socket.AF_INET):
    return struct.pack('=HH4s8x', family, socket.htons(number), socket.inet_aton(ip))


def ipv6(number, ip='::1', family=socket.AF_INET6, flow=0, scope=0):
    return struct.pack('=HHI16sI', family, socket.htons(number), flow, socket.inet_pton(socket.AF_INET6, ip), scope)


def bind(what, fd, address, length=None):
    memory = ctypes.create_string_buffer(address, max(len(address), 8192)) if isinstance(address, bytes) else address
    say(what, libc.bind(fd, memory, len(address) if length is None else length))


def tcp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_STREAM)


# Lengths.
for length in [0, 1, 2, 8, 15, 16, 17, 28, 127, 128, 129, 4096, 2**31 - 1, 2**31, 2**32 - 1]:
    with tcp() as s:
        bind('IPv4, length {}'.format(length), s.fileno(), ipv4(port), length)
for length in [0, 1, 16, 23, 24, 27, 28, 29, 128, 129, 4096]:
    with tcp(socket.AF_INET6) as s:
        bind('IPv6, length {}'.format(length), s.fileno(), ipv6(port), length)

# Pointers.
page = libc.mmap(None, 8192, 3, 0x22, -1, 0)
libc.munmap(ctypes.c_void_p(page + 4096), ctypes.c_size_t(4096))
for what, pointer in [('null', None), ('1', 1), ('the top', 2**64 - 8), ('the kernel', 2**63 + 4096)]:
    with tcp() as s:
        bind('pointer: ' + what, s.fileno(), pointer, 16)
ctypes.memmove(page + 4096 - 8, ipv4(port), 8)
with tcp() as s:
    bind('pointer: half of it mapped', s.fileno(), page + 4096 - 8, 16)
ctypes.memmove(page + 4096 - 16, ipv4(port), 16)
with tcp() as s:
    bind('pointer: just all of it mapped', s.fileno(), page + 4096 - 16, 16)
with tcp() as s:
    bind('pointer: mapped, but not what the length says', s.fileno(), page + 4096 - 16, 64)

# Families.
for family in [socket.AF_UNSPEC, socket.AF_UNIX, socket.AF_INET6, socket.AF_NETLINK, 45, 255, 65535]:
    with tcp() as s:
        bind('IPv4 socket, family {}'.format(family), s.fileno(), ipv4(port, family=family))
for family in [socket.AF_UNSPEC, socket.AF_INET, socket.AF_UNIX, 65535]:
    with tcp(socket.AF_INET6) as s:
        bind('IPv6 socket, family {}'.format(family), s.fileno(), ipv6(port, family=family))
with tcp() as s:
    bind('IPv4 socket, unspecified family, any address', s.fileno(), ipv4(port, '0.0.0.0', socket.AF_UNSPEC))
with tcp() as s:
    bind('IPv4 socket, IPv6 address', s.fileno(), ipv6(port))
with tcp() as s:
    bind('IPv4 socket, mapped address', s.fileno(), ipv6(port, '::ffff:127.0.0.1'))
with tcp(socket.AF_INET6) as s:
    bind('IPv6 socket, IPv4 address', s.fileno(), ipv4(port))
with tcp(socket.AF_INET6) as s:
    bind('IPv6 socket, mapped address', s.fileno(), ipv6(port, '::ffff:127.0.0.1'))
with tcp(socket.AF_INET6) as s:
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bind('IPv6-only socket, mapped address', s.fileno(), ipv6(port, '::ffff:127.0.0.1'))
with tcp(socket.AF_INET6) as s:
    bind('IPv6 link-local address without a scope', s.fileno(), ipv6(port, 'fe80::1'))
with tcp(socket.AF_INET6) as s:
    bind('IPv6 link-local address, scope of no interface', s.fileno(), ipv6(port, 'fe80::1', scope=9999))
with tcp(socket.AF_INET6) as s:
    bind('IPv6 multicast address', s.fileno(), ipv6(port, 'ff02::1'))
with tcp() as s:
    bind('an address that is not ours', s.fileno(), ipv4(port, '192.0.2.1'))
with tcp(socket.AF_INET6) as s:
    bind('an IPv6 address that is not ours', s.fileno(), ipv6(port, '2001:db8::1'))
with tcp() as s:
    bind('a broadcast address', s.fileno(), ipv4(port, '255.255.255.255'))
with tcp() as s:
    bind('a multicast address', s.fileno(), ipv4(port, '224.0.0.1'))
with tcp() as s:
    bind('port 0', s.fileno(), ipv4(0))
    bind('a port after port 0', s.fileno(), ipv4(port))
    say('listen', libc.listen(s.fileno(), 1))

# Other sockets, and fds that are no socket.
reader, writer = os.pipe()
bind('a pipe', reader, ipv4(port))
say('a pipe, listen', libc.listen(reader, 1))
with open('/dev/null') as null:
    bind('a device', null.fileno(), ipv4(port))
    say('a device, listen', libc.listen(null.fileno(), 1))
folder = os.open('/', os.O_PATH)
bind('a path', folder, ipv4(port))
say('a path, listen', libc.listen(folder, 1))
for fd in [-1, 999, 2**31 - 1]:
    bind('closed fd {}'.format(fd), fd, ipv4(port))
    say('closed fd {}, listen'.format(fd), libc.listen(fd, 1))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    bind('UDP', s.fileno(), ipv4(port))
    say('UDP, listen', libc.listen(s.fileno(), 1))
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
    bind('Unix socket, IPv4 address', s.fileno(), ipv4(port))
    say('Unix socket, listen unbound', libc.listen(s.fileno(), 1))
    bind('Unix socket, abstract address', s.fileno(), struct.pack('=H', 1) + b'\0probe-%d' % os.getpid())
    say('Unix socket, listen', libc.listen(s.fileno(), 1))
with socket.socketpair()[0] as s:
    bind('one of a pair, IPv4 address', s.fileno(), ipv4(port))
    say('one of a pair, listen', libc.listen(s.fileno(), 1))
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
    bind('netlink, IPv4 address', s.fileno(), ipv4(port))
    bind('netlink', s.fileno(), struct.pack('=HHII', socket.AF_NETLINK, 0, 0, 0))
    say('netlink, listen', libc.listen(s.fileno(), 1))

# Twice.
with tcp() as s:
    bind('first bind', s.fileno(), ipv4(port))
    bind('second bind, same address', s.fileno(), ipv4(port))
    bind('second bind, another port', s.fileno(), ipv4(other))
    bind('second bind, port 0', s.fileno(), ipv4(0))
    bind('second bind, length 1', s.fileno(), ipv4(port), 1)
    bind('second bind, null', s.fileno(), None, 16)
    bind('second bind, other family', s.fileno(), ipv6(port))
    say('listen', libc.listen(s.fileno(), 1))
    say('listen again', libc.listen(s.fileno(), 100))
    say('listen, negative backlog', libc.listen(s.fileno(), -1))
    say('listen, huge backlog', libc.listen(s.fileno(), 2**31 - 1))
    bind('bind of a listener', s.fileno(), ipv4(other))
    with tcp() as t:
        bind('in use', t.fileno(), ipv4(port))
        bind('in use by the wildcard', t.fileno(), ipv4(port, '0.0.0.0'))
        bind('not in use', t.fileno(), ipv4(other))
        say('listen', libc.listen(t.fileno(), 1))
    with tcp(socket.AF_INET6) as t:
        bind('in use by both families', t.fileno(), ipv6(port, '::'))
    with tcp(socket.AF_INET6) as t:
        t.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bind('not in use by IPv6 alone', t.fileno(), ipv6(port, '::'))

# Sharing within one process.
for mine, its in [(0, 0), (0, 1), (1, 0), (1, 1)]:
    with tcp() as s, tcp() as t:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, mine)
        t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, its)
        bind('SO_REUSEPORT {} first'.format(mine), s.fileno(), ipv4(third))
        say('listen', libc.listen(s.fileno(), 1))
        bind('SO_REUSEPORT {} second'.format(its), t.fileno(), ipv4(third))
with tcp() as s, tcp() as t:
    for u in (s, t):
        u.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    u = t
    u.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    bind('SO_REUSEPORT set first', s.fileno(), ipv4(third))
    bind('SO_REUSEPORT taken back second', t.fileno(), ipv4(third))

# listen without a bind, on a connection, and after a shutdown.
with tcp() as s:
    say('listen unbound', libc.listen(s.fileno(), 1))
    with socket.create_connection(('127.0.0.1', s.getsockname()[1])) as c:
        bind('bind of a connection', c.fileno(), ipv4(third))
        say('listen on a connection', libc.listen(c.fileno(), 1))
with tcp() as s:
    bind('bind to be shut down', s.fileno(), ipv4(third))
    say('listen to be shut down', libc.listen(s.fileno(), 1))
    s.shutdown(socket.SHUT_RDWR)
    say('listen after the shutdown', libc.listen(s.fileno(), 1))

# Options.
one = ctypes.c_int(1)
with tcp() as s, tcp(socket.AF_INET6) as t:
    for fd, name in [(s.fileno(), 'IPv4'), (t.fileno(), 'IPv6'), (999, 'closed'), (reader, 'pipe')]:
        for level, option in [(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY), (socket.SOL_SOCKET, socket.SO_REUSEPORT)]:
            for what, pointer, length in [('1', ctypes.byref(one), 4), ('short', ctypes.byref(one), 3), ('long', ctypes.byref(one), 8),
                                          ('empty', ctypes.byref(one), 0), ('null', None, 4), ('negative', ctypes.byref(one), 2**32 - 1)]:
                say('option {}/{} of {}: {}'.format(level, option, name, what),
                    libc.setsockopt(fd, level, option, pointer, length))
with tcp(socket.AF_INET6) as s:
    bind('bind before IPV6_V6ONLY', s.fileno(), ipv6(third))
    say('IPV6_V6ONLY of a bound socket', libc.setsockopt(s.fileno(), socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ctypes.byref(one), 4))

# The socket after a bind.
with tcp() as s:
    s.setblocking(False)
    before = s.fileno()
    bind('the last one', s.fileno(), ipv4(port))
    print('same fd:', before == s.fileno(), 'name:', s.getsockname()[0], s.getsockname()[1] == port,
          'blocking:', os.get_blocking(s.fileno()), 'inherited:', os.get_inheritable(s.fileno()), flush=True)
    say('listen', libc.listen(s.fileno(), 1))
    print('listens:', s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), flush=True)
