"""Whatever an application writes, the direct path and plain ASGI put the same bytes before the client."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.server.api.asgi import Receive, Scope, Send
from trtserve.server.api.body import read_body
from trtserve.server.api.stream import AsgiStream, DirectStream, open_stream
from trtserve.server.http import bind, serve_http
from trtserve.settings.schema import Settings

_BUFFER = 2**20
HEADERS = [(b"content-type", b"text/event-stream"), (b"x-a", b"1")]

Piece: TypeAlias = tuple[bytes, bool, bool]
"""What is written, whether inside a frame, and whether other tasks get their turn behind it."""

PIECES = st.lists(st.tuples(st.binary(min_size=1, max_size=3000), st.booleans(), st.booleans()), max_size=12)


async def write_what_is_asked(scope: Scope, receive: Receive, send: Send) -> None:
    """The body is a list of pieces and what comes last, bytes in hexadecimal."""
    if scope["type"] != "http":
        return
    pieces, last = json.loads(await read_body(scope, receive, send, _BUFFER))
    if scope["path"] == "/direct":
        stream = open_stream(send, HEADERS, pytest.fail, _BUFFER)
        assert isinstance(stream, DirectStream) is (scope["http_version"] == "1.1")
    else:
        stream = AsgiStream(send, HEADERS, pytest.fail, _BUFFER)
    async with stream:
        for piece, is_framed, yields in pieces:
            # A frame is for what follows the first piece.
            write = stream.framed(b"<", b">") if is_framed and stream.started else stream.write
            write(bytes.fromhex(piece))
            if yields:
                await asyncio.sleep(0)
        await stream.end(bytes.fromhex(last))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Hypercorn as the server runs it, on a loop of its own."""
    bound = bind("127.0.0.1", 0)
    bound.listen()  # as it will in a moment; the first client may be faster than the thread
    port = bound.getsockname()[1]
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    serving = threading.Thread(
        target=loop.run_until_complete, args=(serve_http(write_what_is_asked, bound, Settings(model="x"), stop),)
    )
    serving.start()
    yield port
    loop.call_soon_threadsafe(stop.set)
    serving.join(10)
    loop.close()


def ask(connection: http.client.HTTPConnection, path: str, pieces: list[Piece], last: bytes) -> tuple[bytes, dict]:
    connection.request("POST", path, json.dumps([[(piece.hex(), *how) for piece, *how in pieces], last.hex()]))
    response = connection.getresponse()
    return response.read(), {name.lower(): value for name, value in response.getheaders()}


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, last=st.binary(min_size=1, max_size=100))
def test_both_paths_give_the_same(port: int, pieces: list[Piece], last: bytes):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        # One connection for all: what either path leaves behind is what the next one finds.
        answers = [ask(connection, path, pieces, last) for path in ("/direct", "/asgi", "/direct")]
    finally:
        connection.close()
    assert answers[0] == answers[1] == answers[2]
    framed = [b"<%b>" % piece if is_framed and index else piece for index, (piece, is_framed, _) in enumerate(pieces)]
    assert answers[0][0] == b"".join(framed) + last
    assert answers[0][1]["transfer-encoding"] == "chunked"


def test_http_1_0_gives_the_same_too(port: int):
    pieces = [(b"a" * 10, False, True), (b"b" * 5000, True, False)]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"
    try:
        body, headers = ask(connection, "/direct", pieces, b"end")
    finally:
        connection.close()
    assert body == b"a" * 10 + b"<" + b"b" * 5000 + b">end"
    assert "transfer-encoding" not in headers
