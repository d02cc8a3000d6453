"""A server that answers as the others do, and for requests of reuse-run does what a file says: `healthy.py FILE ADDRESS...`,
where FILE-GENERATION holds a word (200 if there is no such file), and an ADDRESS is 127.0.0.1:3000, [::]:3000, v6only:3000, a
path, or `given`. It prints `asked pid=... generation=... word=...` for each of these requests, and has no signal handler."""
import os
import socket
import sys
import threading
import time

STARTED = time.monotonic()
generation = os.environ.get('REUSE_RUN_GENERATION')
who = 'pid={} generation={} slot={}'.format(os.getpid(), generation, os.environ.get('REUSE_RUN_SLOT'))


def listener(address):
    if address.startswith('/'):
        one = socket.socket(socket.AF_UNIX)
        one.bind(address)
    else:
        host, port = address.rsplit(':', 1)
        v6only = host == 'v6only'
        host = '::' if v6only else host.strip('[]')
        one = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
        if one.family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, int(port)))
    one.listen(512)
    return one


def head(status, more=''):
    return 'HTTP/1.1 {}\r\nConnection: close\r\n{}\r\n'.format(status, more).encode()


def answer_as_told(connection):
    try:
        with open('{}-{}'.format(sys.argv[1], generation)) as file:
            word = file.read().strip()
    except FileNotFoundError:
        word = '200'
    os.write(1, 'asked {} word={}\n'.format(who, word).encode())
    if word == '503-for-2s':
        word = '503' if time.monotonic() - STARTED < 2 else '200'
    if word == 'hangs':
        time.sleep(1000)
    elif word == 'closes':
        pass
    elif word == 'garbage':
        connection.sendall(b'\x15\x03\x01\x00\x02\x02\x46')
    elif word == 'half':
        connection.sendall(head('200 OK')[:-2])
        time.sleep(1000)
    elif word == 'endless':
        while True:
            connection.sendall(head('200 OK')[:-2] + b'X: y\r\n' * 1000)
    elif word == '10MB':
        connection.sendall(head('200 OK', 'Content-Length: 10000000\r\n') + bytes(10_000_000))
    else:
        status = {'200': '200 OK', '301': '301 Moved Permanently', '503': '503 Service Unavailable'}[word]
        connection.sendall(head(status, 'Content-Length: 0\r\n'))


def serve(connection):
    try:
        connection.settimeout(60)
        request = b''
        while b'\r\n\r\n' not in request:
            part = connection.recv(65536)
            if not part:
                return
            request += part
        if b'\r\nUser-Agent: reuse-run\r\n' in request:
            answer_as_told(connection)
        else:
            connection.sendall(head('200 OK', 'Content-Length: {}\r\n'.format(len(who))) + who.encode())
    except OSError:
        pass
    finally:
        connection.close()


def accept(one):
    while True:
        connection, _ = one.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


if sys.argv[2] == 'given':
    given = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ['LISTEN_FDS']))]
else:
    given = [listener(address) for address in sys.argv[2:]]
for one in given[1:]:
    threading.Thread(target=accept, args=(one,), daemon=True).start()
accept(given[0])
