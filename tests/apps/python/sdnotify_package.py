"""A server that says with the package sdnotify, as its users do, that it is ready."""
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import sdnotify


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = 'pid={} generation={} slot={}\n'.format(
            os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT')).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
notifier = sdnotify.SystemdNotifier(debug=True)  # an error is raised, not swallowed
notifier.notify('STATUS=warming up')
notifier.notify('READY=1')
server.serve_forever()
