import asyncio
import os

BODY = f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n".encode()


async def serve(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY))
    await writer.drain()
    writer.close()


async def main():
    server = await asyncio.start_server(serve, port=os.environ["PORT"])
    await server.serve_forever()


asyncio.run(main())
