"""The same answer as a WSGI application, for gunicorn, and as an ASGI application, for uvicorn."""
import os

BODY = 'pid={} generation={} slot={}\n'.format(
    os.getpid(), os.environ.get('REUSE_RUN_GENERATION'), os.environ.get('REUSE_RUN_SLOT')).encode()
HEADERS = [('Content-Type', 'text/plain'), ('Content-Length', str(len(BODY)))]


def wsgi(environ, start_response):
    start_response('200 OK', HEADERS)
    return [BODY]


async def asgi(scope, receive, send):
    assert scope['type'] == 'http'
    headers = [(name.encode(), value.encode()) for name, value in HEADERS]
    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
    await send({'type': 'http.response.body', 'body': BODY})
