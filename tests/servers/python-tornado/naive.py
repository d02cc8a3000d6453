import asyncio
import os

import tornado.web


class Index(tornado.web.RequestHandler):
    def get(self):
        self.write(f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n")


async def main():
    tornado.web.Application([("/", Index)]).listen(int(os.environ["PORT"]))
    await asyncio.Event().wait()


asyncio.run(main())
