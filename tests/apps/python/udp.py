"""Answers datagrams, and connections to the same ports, at the addresses that the arguments name.

The answer is `pid=… generation=… slot=… TEXT`. Of some texts:
sleep MS …   is answered so much later
connect …    is answered by a new socket of the same port, which the server connects to the client
take …       is answered by the socket, which the server connects to the client
close …      closes the socket, after the answer
shut …       is not answered: the server shuts the socket down for reading
refused …    is not answered: the server connects the socket to a port of nobody, and sends
join …       has the socket join a multicast group
bind PORT …  binds another port, and says so
options …    has the names of the socket options that aren't as in a new socket
"""
import argparse
import ctypes
import os
import selectors
import signal
import socket
import struct
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument('addresses', nargs='*')
parser.add_argument('--share', action='store_true')
parser.add_argument('--set', action='store_true', help='options before the bind')
parser.add_argument('--member', action='store_true', help='of a multicast group, before the bind')
parser.add_argument('--filter', action='store_true', help='that lets everything pass, before the bind')
parser.add_argument('--tcp', type=int, nargs='?', const=0, help='serve TCP there too, after so many milliseconds')
parser.add_argument('--given', type=int, default=0, help='how many sockets of LISTEN_FDS')
parser.add_argument('--query', type=int, nargs='?', const=0, help='bind some other port at the start, for so many milliseconds')
parser.add_argument('--private', action='store_true', help='answer at some other port too')
parser.add_argument('--child', action='store_true', help='have a child serve')
parser.add_argument('--count', action='store_true', help='answer nothing, and print at SIGTERM how many datagrams came')
arguments = parser.parse_args()

WHO = 'pid={} generation={} slot={} '.format(
    os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))
OPTIONS = {
    'SO_REUSEADDR': (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    'SO_BROADCAST': (socket.SOL_SOCKET, socket.SO_BROADCAST, 1), 'IP_PKTINFO': (socket.IPPROTO_IP, 8, 1), 'IP_RECVTOS': (socket.IPPROTO_IP, 13, 1),
    'IP_MTU_DISCOVER': (socket.IPPROTO_IP, 10, 0), 'IP_TTL': (socket.IPPROTO_IP, socket.IP_TTL, 7),
    'IP_MULTICAST_TTL': (socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 5),
    'UDP_GRO': (socket.IPPROTO_UDP, 104, 1), 'SO_RCVBUF': (socket.SOL_SOCKET, socket.SO_RCVBUF, 50000),
    'SO_RXQ_OVFL': (socket.SOL_SOCKET, 40, 1), 'IP_RECVORIGDSTADDR': (socket.IPPROTO_IP, 20, 1),
}
OPTIONS_V6 = {'IPV6_RECVPKTINFO': (socket.IPPROTO_IPV6, 49, 1), 'IPV6_RECVTCLASS': (socket.IPPROTO_IPV6, 66, 1)}
DEFAULTS = {}


def say(line):
    os.write(1, (line + '\n').encode())


def options_of(family):
    return {**OPTIONS, **(OPTIONS_V6 if family == socket.AF_INET6 else {})}


def changed(sock):
    """The names of the options that aren't as in a new socket."""
    names = options_of(sock.family)
    if sock.family not in DEFAULTS:
        with socket.socket(sock.family, socket.SOCK_DGRAM) as new:
            DEFAULTS[sock.family] = {name: new.getsockopt(*names[name][:2]) for name in names}
    return ' '.join(sorted(n for n in names if sock.getsockopt(*names[n][:2]) != DEFAULTS[sock.family][n]))


def join(sock):
    group = socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1')
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def new(kind, address, shares):
    host, port = address.rsplit(':', 1)
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    sock = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shares:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if arguments.set and kind == socket.SOCK_DGRAM:
        for option in options_of(family).values():
            sock.setsockopt(*option)
    if arguments.filter and kind == socket.SOCK_DGRAM:
        everything = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0xFFFFFFFF))
        program = struct.pack('HL', 1, ctypes.addressof(everything))
        sock.setsockopt(socket.SOL_SOCKET, 26, program)
    if arguments.member and kind == socket.SOCK_DGRAM:
        join(sock)
    sock.bind((host.strip('[]'), int(port)))
    return sock


def answer(sock, text, client):
    words = text.split()
    if words[0] == 'sleep':
        threading.Timer(int(words[1]) / 1000, sock.sendto, ((WHO + text).encode(), client)).start()
        return
    if words[0] == 'connect':
        name = sock.getsockname()
        sock = new(socket.SOCK_DGRAM, '{}:{}'.format(name[0], name[1]), True)
        sock.connect(client)
        kept.append(sock)
        sock.send((WHO + text).encode())
        return
    if words[0] in ('shut', 'refused'):
        selector.unregister(sock)
        try:
            if words[0] == 'shut':
                sock.shutdown(socket.SHUT_RD)
            sock.connect(('127.0.0.1', free_port()))
            sock.send(b'to nobody')
        except OSError:
            pass  # it isn't connected, and is shut down all the same
        return
    if words[0] == 'take':
        sock.connect(client)
        sock.send((WHO + text).encode())
        return
    if words[0] == 'join':
        join(sock)
    if words[0] == 'bind':
        try:
            kept.append(new(socket.SOCK_DGRAM, '127.0.0.1:' + words[1], False))
            text += ' bound'
        except OSError as error:
            text += ' ' + error.strerror
    if words[0] == 'options':
        text = 'options ' + changed(sock)
    sock.sendto((WHO + text).encode(), client)
    if words[0] == 'close':
        selector.unregister(sock)
        sock.close()


def report(signum, frame):
    say('count {}'.format(count))
    os._exit(0)


count = 0
kept = []
selector = selectors.DefaultSelector()
for address in arguments.addresses:
    try:
        kept.append(new(socket.SOCK_DGRAM, address, arguments.share))
        selector.register(kept[-1], selectors.EVENT_READ)
        if arguments.set:
            say('options: ' + changed(kept[-1]))
    except OSError as error:
        say('udp: {}'.format(error.strerror))
        if not arguments.member and not arguments.filter:
            raise
    if arguments.tcp is not None:
        time.sleep(arguments.tcp / 1000)
        kept.append(new(socket.SOCK_STREAM, address, arguments.share))
        kept[-1].listen()
        selector.register(kept[-1], selectors.EVENT_READ)
if arguments.given:
    say('names: ' + os.environ['LISTEN_FDNAMES'])
for number in range(arguments.given):
    kept.append(socket.socket(fileno=3 + number))
    selector.register(kept[-1], selectors.EVENT_READ)
if arguments.query is not None:
    query = new(socket.SOCK_DGRAM, '127.0.0.1:{}'.format(20000 + os.getpid() % 10000), False)
    say('query: {}'.format(query.getsockname()[1]))
    threading.Timer(arguments.query / 1000, query.close).start()
if arguments.private:
    kept.append(new(socket.SOCK_DGRAM, '127.0.0.1:{}'.format(free_port()), False))
    selector.register(kept[-1], selectors.EVENT_READ)
    say('private: {} {}'.format(os.getpid(), kept[-1].getsockname()[1]))
if 'READY_FD' in os.environ:
    os.write(int(os.environ['READY_FD']), b'\n')

if arguments.child:
    child = os.fork()
    if child > 0:
        kept.clear()
        selector.close()
        end = lambda signum, frame: (os.kill(child, signal.SIGKILL), os._exit(0))
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, end)
        while True:
            time.sleep(0.1)

if arguments.count:
    signal.signal(signal.SIGTERM, report)
    kept[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200000)
    while True:
        kept[0].recv(2048)
        count += 1

while True:
    for key, _ in selector.select():
        if key.fileobj.type == socket.SOCK_STREAM:
            connection, _ = key.fileobj.accept()
            text = connection.recv(2048)
            connection.sendall(WHO.encode() + text)
            connection.close()
            continue
        text, client = key.fileobj.recvfrom(2048)
        answer(key.fileobj, text.decode(), client)
