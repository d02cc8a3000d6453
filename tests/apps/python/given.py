"""Serves given listeners (sd_listen_fds(3)), and prints what it was given. At SIGINT or SIGTERM it accepts no more,
finishes its requests and exits with 0.

listen:         ready by listen(2), which most servers call again
pipe:           ready by READY_FD; it never calls listen(2)
systemd-notify: ready by `systemd-notify --ready`, a child
bind:           as listen, but it binds the address of its only listener again and serves that socket

While the file of the second argument exists it accepts nothing.
"""
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

how = sys.argv[1]
deaf_while = sys.argv[2] if len(sys.argv) > 2 else None
who = 'pid={} generation={} slot={}'.format(
    os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))


def say(line):
    os.write(1, (line + '\n').encode())


def shown(listener):
    host, port = listener.getsockname()[:2]
    blocking = os.get_blocking(listener.fileno())
    return '{}/{}/{}/{}/{}'.format(listener.fileno(), host, port, os.fstat(listener.fileno()).st_ino, blocking)


def answer(connection):
    try:
        connection.settimeout(30)
        request = b''
        while b'\r\n\r\n' not in request:
            part = connection.recv(65536)
            if not part:
                break
            request += part
        else:
            body = who + '\n'
            head = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n'.format(len(body))
            connection.sendall((head + body).encode())
    except OSError:
        pass
    connection.close()


count = int(os.environ['LISTEN_FDS'])
listeners = [socket.socket(fileno=fd) for fd in range(3, 3 + count)]
say('given {} listen_pid={} fds={} names={} ready_fd={} listeners={}'.format(
    who, os.environ['LISTEN_PID'], count, os.environ['LISTEN_FDNAMES'], os.environ['READY_FD'],
    ','.join(map(shown, listeners))))

stop, stopper = os.pipe()
os.set_blocking(stopper, False)
signal.set_wakeup_fd(stopper)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)

if how == 'bind':
    given = listeners[0]
    bound = socket.socket(given.family, given.type)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(given.getsockname())
    say('bound {} listeners={}'.format(who, shown(bound)))
    listeners = [bound]
for listener in listeners:
    if how in ('listen', 'bind'):
        listener.listen(512)
    listener.setblocking(False)  # another process may accept the connection before this one
if how == 'pipe':
    os.write(int(os.environ['READY_FD']), b'\n')
elif how == 'systemd-notify':
    status = subprocess.run(['systemd-notify', '--ready', '--status=warm'], timeout=60).returncode
    say('systemd-notify {} status={}'.format(who, status))

threads = set()
stopping = False
while not stopping:
    if deaf_while and os.path.exists(deaf_while):
        time.sleep(0.01)
        continue
    for ready in select.select([*listeners, stop], [], [])[0]:
        if ready is stop:
            stopping = True
            continue
        try:
            connection, _ = ready.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        threads = {thread for thread in threads if thread.is_alive()}
        thread = threading.Thread(target=answer, args=(connection,))
        thread.start()
        threads.add(thread)
for thread in threads:
    thread.join()
