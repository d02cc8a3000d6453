"""A WSGI app that says who answers whom. `/late` is answered after a long time."""
import os
import time


def app(environ, start_response):
    if environ["PATH_INFO"] == "/late":
        time.sleep(1000)
    answer = {
        "pid": os.getpid(),
        "generation": os.environ["REUSE_RUN_GENERATION"],
        "uid": os.getuid(),
        "greeting": os.environ.get("GREETING"),
        "client": environ["REMOTE_ADDR"],
    }
    body = " ".join(f"{name}={value}" for name, value in answer.items()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
