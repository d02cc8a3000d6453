"""HTTPS with a thread for each connection and no signal handling: `server.py PORT WORK`. A request takes WORK milliseconds;
the answer repeats the path."""
import os
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../tls')


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(int(sys.argv[2]) / 1000)
        body = f'done {self.path[1:]} 0\n'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128

    def get_request(self):
        connection, address = super().get_request()
        # The first read of the connection's thread does the handshake, so that no client keeps the others from theirs.
        return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, *args):
        pass


context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(f'{TLS}/cert.pem', f'{TLS}/key.pem')
Server(('', int(sys.argv[1])), Handler).serve_forever()
