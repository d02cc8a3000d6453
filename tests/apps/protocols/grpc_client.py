"""gRPC clients: `grpc_client.py KIND PORT WORK COUNT`. KIND is `unary`, `stream` or `kept`: a new channel for each call, or
for six. They print what client.js prints, and end as its clients do."""
import random
import sys
import threading
import time
from concurrent import futures

import grpc

KIND, PORT, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[4])
TIMEOUT = 30
# No channel shares a connection with another one, and nothing is tried again.
OPTIONS = [('grpc.use_local_subchannel_pool', 1), ('grpc.enable_retries', 0), ('grpc.initial_reconnect_backoff_ms', 60_000)]
ending = threading.Event()
printing = threading.Lock()


def say(line):
    with printing:
        print(line.replace('\n', ' '), flush=True)


def unary(channel, name):
    answer = channel.unary_unary('/test/Unary')(name, timeout=TIMEOUT)
    assert answer == b'done ' + name, answer


def stream(channel, name):
    answer = list(channel.unary_stream('/test/Stream')(name, timeout=TIMEOUT))
    assert answer == [b'%d ' % number + name for number in range(5)], answer


def kept(channel, name):
    """Two rounds of three calls at a time."""
    for part in range(2):
        with futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda number: unary(channel, name + b'-%d-%d' % (part, number)), range(3)))


def loop(client):
    time.sleep(client * int(sys.argv[3]) / 1000 / COUNT)
    number = 0
    while not ending.is_set():
        name = b'%d-%d' % (client, number)
        number += 1
        try:
            with grpc.insecure_channel(f'127.0.0.1:{PORT}', OPTIONS) as channel:
                {'unary': unary, 'stream': stream, 'kept': kept}[KIND](channel, name)
            say('ok ')
        except Exception as error:
            if 'Connection refused' in str(error):
                return say(f'refused {error}')
            say(f'failed {name} {error!r}')
        time.sleep(random.random() * 0.06)


clients = [threading.Thread(target=loop, args=(client,)) for client in range(COUNT)]
for client in clients:
    client.start()


def wait_for_end():
    sys.stdin.read()
    ending.set()


threading.Thread(target=wait_for_end, daemon=True).start()
for client in clients:
    client.join()
