"""A WSGI application for gunicorn. A request for /work takes 10 s."""
import time


def application(environ, start_response):
    time.sleep(10 if environ['PATH_INFO'] == '/work' else 0)
    start_response('200 OK', [('Content-Length', '2')])
    return [b'ok']
