"""A worker that does to the extreme what the first argument names, and serves the port that is the second one."""
import os
import select
import socket
import sys
import threading

what, port = sys.argv[1], int(sys.argv[2])
body = 'pid={} generation={} slot={}\n'.format(
    os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT'))
answer = 'HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{}'.format(len(body), body).encode()


def say(line):
    os.write(1, (line + '\n').encode())


def serve(listener, wait):
    if not select.select([listener], [], [], wait)[0]:
        return
    try:
        connection, _ = listener.accept()
        connection.settimeout(5)
        connection.recv(65536)
        connection.sendall(answer)
        connection.close()
    except OSError:
        pass  # the listener was shut down, or the client is gone


listener = socket.socket()
listener.bind(('127.0.0.1', port))
listener.listen(64)

first = os.environ.get('REUSE_RUN_GENERATION') == '1'
if what == 'shutdowns' and first:  # as some programs do instead of closing it, and then listen again
    for count in range(200):
        serve(listener, 0.002)
        listener.shutdown(socket.SHUT_RDWR)
        listener.listen(64)
    say('has shut down')
elif what == 'notifications':
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.connect(os.environ['NOTIFY_SOCKET'].replace('@', '\0'))

    def flood():
        for count in range(int(sys.argv[3])):
            notify.send(b'STATUS=%d' % count)
        notify.send(b'STATUS=the last')

    notify.send(b'READY=1')
    threading.Thread(target=flood).start()
elif what == 'holds':  # many connections
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    listener.setblocking(False)
    held = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                connection, _ = listener.accept()
                connection.settimeout(5)
                held[connection.fileno()] = connection
                poll.register(connection, select.EPOLLIN)
            elif held[fd].recv(65536):
                held[fd].sendall(answer.replace(b'Connection: close\r\n', b''))
            else:
                held.pop(fd).close()

while True:
    serve(listener, None)
