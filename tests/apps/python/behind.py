"""A server whose processes are not all its main one. Arguments: address, folder, and what it does.

As long as the folder has a file `background`, it goes into the background: `late` after it has listened (as nginx does), `early`
before, by two forks (redis), `waits` when its child listens (named), `deaf` as `late`, and then ignores SIGINT.

`prefork` listens and has a child accept. On SIGINT it closes its listener, and stops the child 2 s later. `helper` leaves a process that has its
listener open, and ends with SIGINT, status 0. `recycled` leaves one that hasn't, and ends by itself with status 0 when the folder has a file
`recycle`. `ignores` ignores SIGINT.
"""
import os
import signal
import sys
import time
from http.server import ThreadingHTTPServer

from handler import Handler

(host, _, port), folder, what = sys.argv[1].rpartition(':'), sys.argv[2], sys.argv[3]


def say(line):
    os.write(1, '{} {}\n'.format(line, os.getpid()).encode())


def fork():
    """Only the child returns; the parent ends at once."""
    if os.fork():
        os._exit(0)


def has(flag):
    return os.path.exists(os.path.join(folder, flag))


say('started')
if what in ('deaf', 'ignores'):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
goes = has('background')
if goes and what == 'early':
    fork()
    os.setsid()
    fork()
if goes and what == 'waits':
    listens, tells = os.pipe()
    if os.fork():
        os.close(tells)
        os.read(listens, 1)
        os._exit(0)
    os.setsid()
server = ThreadingHTTPServer((host, int(port)), Handler)
if goes and what == 'waits':
    os.write(tells, b'.')
if goes and what in ('late', 'deaf'):
    fork()
    os.setsid()
if what == 'prefork':
    stop, stops = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, lambda *_: say('child got SIGINT'))
        os.close(stops)
        import threading
        threading.Thread(target=server.serve_forever, daemon=True).start()
        os.read(stop, 1)
        os._exit(0)
    signal.signal(signal.SIGINT, lambda *_: (server.socket.close(), time.sleep(2), os.close(stops), os.waitpid(child, 0), os._exit(0)))
    while True:
        time.sleep(0.1)
if what in ('helper', 'recycled') and not os.fork():
    os.setsid()
    if what == 'recycled':
        server.socket.close()
    say('helper')
    time.sleep(600)
    os._exit(0)
if what == 'helper':
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
if what == 'recycled':
    import threading
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not has('recycle'):
        time.sleep(0.02)
    os.remove(os.path.join(folder, 'recycle'))
    os._exit(0)
server.serve_forever()
