import os

from sanic import Sanic, text

app = Sanic("app")


@app.get("/")
async def index(request):
    return text(f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n")
