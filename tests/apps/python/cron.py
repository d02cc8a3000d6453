"""A server whose worker in slot 0 also does a job every 20 ms, until it is told that it is retired."""
import http.server
import os
import signal
import sys
import threading
import time

retired = os.environ.get('REUSE_RUN_SLOT') != '0'
one_job = threading.Lock()


def retire(*_):
    global retired
    with one_job:
        retired = True
        print('retired', os.getpid(), flush=True)


def jobs():
    while True:
        with one_job:
            if retired:
                return
            print('job', os.getpid(), flush=True)
        time.sleep(0.02)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while not retired:  # so that it hears of it before the stop signal comes
            time.sleep(0.02)
        self.send_response(204)
        self.end_headers()


signal.signal(signal.SIGUSR2, retire)
server = http.server.ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
threading.Thread(target=jobs, daemon=True).start()
server.serve_forever()
