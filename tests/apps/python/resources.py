"""Binds in the way that the first argument names, with ports from the second argument on, prints the results, and serves
its listeners."""
import errno
import os
import random
import select
import signal
import socket
import sys
import threading
import time

from answering import answer

what, port = sys.argv[1], int(sys.argv[2])
listeners = []


def say(line):
    os.write(1, (line + '\n').encode())


def listen(number, share=False):
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    s.bind(('127.0.0.1', number))
    s.listen(64)
    listeners.append(s)
    return s


def bind_and_close(number):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(('127.0.0.1', number))


def bind_for_ever(first):
    """One bind after the other, so that a signal is likely to come during one."""
    number = first
    while True:
        bind_and_close(number)
        number = first + (number - first + 1) % 100


def serve_one(s):
    answer(s.accept()[0])


def serve():
    say('serves')
    while True:
        for s in select.select(listeners, [], [])[0]:
            serve_one(s)


def child(run):
    """Starts a process that only calls this."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except OSError as error:
            say('child: {}'.format(error))
        os._exit(1)
    return pid


def sleep_a_little():
    time.sleep(random.uniform(0, 0.004))


if what == 'fifty':
    for number in range(port, port + 50):
        listen(number)
elif what == 'again':
    for _ in range(1000):
        bind_and_close(port)
    say('bound one port 1000 times')
    for number in range(port + 1, port + 1001):
        bind_and_close(number)
    say('bound 1000 ports')
    for _ in range(1000):
        listen(port).close()
        listeners.clear()
    say('listened on one port 1000 times')
    listen(port)
elif what == 'hoard':  # as many ports as there are descriptors, and as many paths in a folder
    listen(port)
    for number in range(port + 1, port + 2000):
        try:
            if number % 2:
                listen(number)
            else:
                listeners.append(socket.socket(socket.AF_UNIX))
                listeners[-1].bind('{}/{}'.format(sys.argv[3], number))
                listeners[-1].listen(8)
        except OSError as error:
            if error.errno == errno.EMFILE:
                break
    for _ in range(10):
        listeners.pop().close()  # what it needs to serve
    say('has all')
elif what == 'daemon':  # a process of the first generation accepts from the listener for ever
    listen(port)
    if os.environ['REUSE_RUN_GENERATION'] == '1':
        def daemon():
            os.setsid()
            while True:
                serve_one(listeners[0])

        pid = child(daemon)
        say('daemon {}'.format(pid))
elif what == 'outlives':  # a process that binds, unlinks and says so when the flag is lowered
    def outlives():
        os.setsid()
        while os.path.exists(sys.argv[3] + '/wait'):
            time.sleep(0.01)
        path = sys.argv[3] + '/socket'
        for _ in range(100):
            with socket.socket() as s, socket.socket(socket.AF_UNIX) as u:
                s.bind(('127.0.0.1', port + 1))
                s.listen(8)
                u.bind(path)
                os.unlink(path)
        os.rename(sys.argv[3] + '/begun', sys.argv[3] + '/done')

    listen(port)
    child(outlives)
elif what == 'leaves':  # a child and a grandchild leave the process group; all ignore the stop signal
    def leave(more):
        os.setsid()
        say('left')
        if more:
            child(lambda: leave(False))
        while True:
            time.sleep(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child(lambda: leave(True))
    listen(port)
elif what == 'used':
    listen(port)
    failed = 0
    for _ in range(3000):
        try:
            listen(port + 1)
        except OSError as error:
            failed += error.errno == errno.EADDRINUSE
    say('failed {} times'.format(failed))
elif what == 'twice':
    for share in (False, True):
        first = listen(port, share)
        try:
            listen(port, share)
            say('shared: the second is fine' if share else 'not shared: the second is fine')
        except OSError as error:
            say('{}: {}'.format('shared' if share else 'not shared', errno.errorcode[error.errno]))
        if not share:
            first.close()
            listeners.clear()
elif what == 'thread':
    thread = threading.Thread(target=listen, args=(port,))
    thread.start()
    thread.join()
elif what in ('grandchild', 'orphan'):
    # It accepts nothing before the flag is lowered, so that connections wait in its queue.
    def grandchild():
        listen(port)
        say('listens')
        while os.path.exists(sys.argv[3]):
            time.sleep(0.01)
        serve()

    def between():
        pid = child(grandchild)
        if what == 'grandchild':
            os.waitpid(pid, 0)

    os.waitpid(child(between), 0)
    while True:
        time.sleep(0.1)
elif what == 'killed':
    for _ in range(200):
        pid = child(lambda: bind_for_ever(port + 1))
        sleep_a_little()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    say('200 are dead')
    listen(port)
elif what == 'interrupted':
    def interrupted():
        # Most run-times ask for restarted system calls. Otherwise an intercepted bind may fail with EINTR.
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        for _ in range(1000):
            bind_and_close(port + 1)
        os._exit(7)

    say('status {}'.format(os.waitstatus_to_exitcode(os.waitpid(child(interrupted), 0)[1])))
    listen(port)
elif what == 'aborts':
    def abort():
        threading.Thread(target=bind_for_ever, args=(port + 1,), daemon=True).start()
        sleep_a_little()
        os.abort()

    cores = 0
    for _ in range(20):
        _, status = os.waitpid(child(abort), 0)
        assert os.WTERMSIG(status) == signal.SIGABRT
        cores += os.WCOREDUMP(status)
    say('20 have aborted, {} dumped core'.format(cores))
    listen(port)
elif what == 'stopped':
    stopped = []
    for _ in range(50):
        pid = child(lambda: bind_for_ever(port + 1))
        sleep_a_little()
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
        bind_and_close(port)
    say('50 are stopped')
    listen(port)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
        sleep_a_little()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    say('50 are dead')
else:
    sys.exit('no such way: ' + what)
serve()
