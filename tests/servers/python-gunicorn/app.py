import os


def app(environ, start_response):
    body = f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
