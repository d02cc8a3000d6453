import os

from flask import Flask

app = Flask(__name__)


@app.get("/")
def index():
    return f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n"
