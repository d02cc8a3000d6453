import os

from aiohttp import web


async def index(request):
    return web.Response(text=f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n")


def main(arguments):
    app = web.Application()
    app.router.add_get("/", index)
    return app
