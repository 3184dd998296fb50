"""A real hypercorn around a few lines of ASGI, and both ways to stream an answer."""

import asyncio
from contextlib import asynccontextmanager

from trtserve.server.api.stream import AsgiStream, DirectStream, open_stream
from trtserve.server.http import bind, serve_http
from trtserve.settings.schema import Settings

HEADERS = [(b"content-type", b"text/event-stream"), (b"x-request-id", b"7")]
BIG = 1 << 30
SEE_ALL = [b"data: 1\n\n", b"data: \xc3\xa9\n\n", b"data: [DONE]\n\n"]


def serving(answer):
    """`running` around `answer(scope, receive, send)`, which is called once the request's body is there."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            while (await receive()).get("more_body", False):
                pass
            await answer(scope, receive, send)

    return running(app)


@asynccontextmanager
async def running(app):
    """hypercorn around an application; gives a way to connect."""
    bound = bind("127.0.0.1", 0)
    address, stop = bound.getsockname(), asyncio.Event()
    server = asyncio.create_task(serve_http(app, bound, Settings.model_construct(), stop))
    writers = []

    async def connect():
        while True:
            try:
                reader, writer = await asyncio.open_connection(*address)
            except ConnectionRefusedError:
                assert not server.done(), server.exception()
                await asyncio.sleep(0.001)
            else:
                writers.append(writer)
                return reader, writer

    try:
        yield connect
    finally:
        for writer in writers:
            writer.transport.abort()
        stop.set()
        async with asyncio.timeout(10):
            await server


def get(version=b"1.1", method=b"GET", more=b""):
    return method + b" / HTTP/" + version + b"\r\nhost: x\r\n" + more + b"\r\n"


async def response(reader):
    """The raw head, and the chunks of a chunked body."""
    head = await reader.readuntil(b"\r\n\r\n")
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    return head, chunks


def plain(send, headers, too_slow, max_buffered_bytes):
    return AsgiStream(send, headers, too_slow, max_buffered_bytes)


def direct(send, headers, too_slow, max_buffered_bytes):
    stream = open_stream(send, headers, too_slow, max_buffered_bytes)
    assert type(stream) is DirectStream
    return stream


def no_one():
    raise AssertionError("nobody is slow here")


class Recorder:
    """An ASGI `send` that may be held up."""

    def __init__(self):
        self.messages, self.open = [], asyncio.Event()
        self.open.set()

    async def __call__(self, message):
        await self.open.wait()
        self.messages.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)
