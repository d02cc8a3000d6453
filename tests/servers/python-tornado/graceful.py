import asyncio
import os
import signal

import tornado.web


class Index(tornado.web.RequestHandler):
    def get(self):
        self.write(f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n")


async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    server = tornado.web.Application([("/", Index)]).listen(int(os.environ["PORT"]))
    await stop.wait()
    server.stop()
    await server.close_all_connections()


asyncio.run(main())
