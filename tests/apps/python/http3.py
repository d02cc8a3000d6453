"""Sends requests by HTTP/3, each on a new connection, from so many clients at a time, until SIGTERM.

http3.py PORT CLIENTS prints a line for each request: `ok ANSWER`, `again ANSWER` if only the second try was answered, on another
connection, and else `failed`.
"""
import asyncio
import signal
import ssl
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived
from aioquic.quic.configuration import QuicConfiguration

TIMEOUT = 10
HEADERS = [(b':method', b'GET'), (b':scheme', b'https'), (b':authority', b'localhost'), (b':path', b'/')]


class Client(QuicConnectionProtocol):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.http = H3Connection(self._quic)
        self.answer = asyncio.get_running_loop().create_future()
        self.body = b''

    async def get(self):
        self.http.send_headers(self._quic.get_next_available_stream_id(), HEADERS, end_stream=True)
        self.transmit()
        return await self.answer

    def quic_event_received(self, event):
        for it in self.http.handle_event(event):
            if isinstance(it, DataReceived):
                self.body += it.data
                if it.stream_ended and not self.answer.done():
                    self.answer.set_result(self.body.decode())


async def request(port):
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=H3_ALPN, verify_mode=ssl.CERT_NONE, server_name='localhost')
    async with connect('127.0.0.1', port, configuration=configuration, create_protocol=Client) as client:
        return await client.get()


async def attempt(port):
    try:
        return await asyncio.wait_for(request(port), TIMEOUT)
    except (OSError, asyncio.TimeoutError):
        return None


async def requests(port, ending):
    while not ending.is_set():
        for outcome in 'ok', 'again':
            answer = await attempt(port)
            if answer is not None:
                break
        print(f'{outcome} {answer}' if answer is not None else 'failed', flush=True)


async def main(port, clients):
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await asyncio.gather(*(requests(port, ending) for _ in range(clients)))


asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
