"""Requests with known heads go past h11, and nobody can tell: every script against hypercorn's own protocol."""

import asyncio
from contextlib import asynccontextmanager
from itertools import pairwise

import h11
import hypercorn.protocol
import pytest
from hypercorn.protocol.h11 import H11Protocol
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.server.api.connections import running
from trtserve.server import http1
from trtserve.server.api.body import answer
from trtserve.server.api.hypercorn_path import find_path
from trtserve.server.api.stream import AsgiStream, open_stream
from trtserve.server.http1 import Http1Protocol
from trtserve.server.request_heads import RequestHeads

PLAIN = "POST /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
HEADS = [
    PLAIN,
    "POST /{kind}?a=1%20b HTTP/1.1\r\nhost: x\r\nconnection: Keep-Alive\r\ncontent-length: {size}\r\nX-Y:  z \r\n",
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: 0{size}\r\n",
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nContent-Length: {size}\r\n",
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nX: \r\nExpect: 100-continue\r\nContent-Length: {size}\r\n",
    "POST /{kind} HTTP/1.1\nHost: x\nContent-Length: {size}\n",
    "PUT /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nUpgrade: h2c\r\n",
]
CLOSING = [
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n",
    "POST /{kind} HTTP/1.0\r\nHost: x\r\nContent-Length: {size}\r\n",
]
WRONG = [
    "POST /{kind} HTTP/1.1\r\nContent-Length: {size}\r\n",  # no host
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nContent-Length: +{size}\r\n",
    "POST /{kind} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nContent-Length: {size}\r\n",
]
GOOD, BAD = ["direct", "asgi", "whole"], ["nothing", "broken"]  # after a bad answer the connection is closed


def request(head, kind, body):
    return (head.format(kind=kind, size=len(body)) + ("\n" if "\r" not in head else "\r\n")).encode() + body


def requests(heads, kinds, most=20):
    return st.builds(request, st.sampled_from(heads), st.sampled_from(kinds), st.binary(max_size=most))


# Nothing may follow what makes the server close, or the client may lose the answer.
LAST_REQUEST = requests(CLOSING, GOOD + BAD) | requests(HEADS, BAD) | requests(WRONG, GOOD, 0)


class App:
    """Answers in the way that the path names, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        kind, body, more = scope["path"].strip("/"), b"", scope["path"] != "/early"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        keys = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
        self.asked.append(({key: scope[key] for key in keys}, body))
        if kind == "asgi" or kind == "early":
            await send({"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
        elif kind == "whole":
            path, headers = find_path(send), [(b"content-type", b"a/b"), (b"x-request-id", b"1")]
            if path is not None:
                await path.whole(headers, b"ok" * len(body))
            else:
                await answer(send, 200, b"ok" * len(body), b"a/b", headers[1:])
        elif kind == "direct" or kind == "broken":
            async with open_stream(send, [(b"x-request-id", b"1"), (b"a", b"b")], lambda: None, 1 << 30) as stream:
                stream.write(b"first")
                if kind == "broken":
                    while isinstance(stream, AsgiStream) and stream._buffered_bytes:  # noqa: ASYNC110
                        await asyncio.sleep(0)
                    raise RuntimeError("on purpose")
                await stream.end(b"last")


@asynccontextmanager
async def serving(app):
    """A server, and how to connect to it, with a protocol of hypercorn's or ours."""
    async with running(app) as connect:

        async def connecting(protocol=Http1Protocol):
            hypercorn.protocol.H11Protocol = protocol  # looked up when the server accepts
            return await connect()

        try:
            yield connecting
        finally:
            http1.install()


def answers(received):
    """(status, headers, body) of each response; the last body may be cut off."""
    client, found = h11.Connection(h11.CLIENT), []
    while received:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
        client.send(h11.EndOfMessage())
        client.receive_data(received)
        client.receive_data(b"")
        try:
            while type(event := client.next_event()) is not h11.EndOfMessage:
                if isinstance(event, h11.Response | h11.InformationalResponse):
                    found.append([event.status_code, sorted(event.headers), b""])
                elif isinstance(event, h11.Data):
                    found[-1][2] += event.data
                elif type(event) is h11.ConnectionClosed:
                    return found
        except h11.RemoteProtocolError:
            return [*found, "cut off"]
        received = client.trailing_data[0]
    return found


async def play(app, connection, pieces):
    """What the application was asked, and what the client was answered until the server closed."""
    app.asked = []
    reader, writer = connection
    for piece in pieces:
        writer.write(piece)
        for _ in range(3):
            await asyncio.sleep(0)  # the server may look at it, or not
    async with asyncio.timeout(10):
        try:
            received = await reader.read()
        except ConnectionResetError:
            received = b"reset"
    return app.asked, answers(received)


@st.composite
def scripts(draw):
    last = draw(LAST_REQUEST)
    if draw(st.booleans()):
        return [*draw(st.lists(requests(HEADS, [*GOOD, "early"]), max_size=5)), last]
    whole = b"".join(draw(st.lists(requests(HEADS, GOOD), max_size=5)))
    cuts = sorted({0, len(whole), *draw(st.lists(st.integers(0, len(whole)), max_size=4))})
    return [*(whole[begin:end] for begin, end in pairwise(cuts)), last]


BYE = request(CLOSING[0], "direct", b"bye")


@pytest.fixture
def served():
    """An event loop with a server, the application, and how to connect."""
    app = App()
    with asyncio.Runner() as runner:
        server = serving(app)
        connecting = runner.run(server.__aenter__())
        yield runner, app, connecting
        runner.run(server.__aexit__(None, None, None))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts())
@example([request(PLAIN, "direct", b"one"), request(PLAIN, "direct", b"fours"), BYE])
@example([request(PLAIN, "direct", b"one") + request(PLAIN, "asgi", b"two"), BYE])
@example([request(PLAIN, "whole", b"one"), request(PLAIN, "whole", b"") + request(PLAIN, "whole", b"two"), BYE])
@example([request(PLAIN, "asgi", b"1"), request(PLAIN, "asgi", b"2"), request(PLAIN, "asgi", b"3")[:-1], b"3", BYE])
@example([request(PLAIN, "broken", b"1"), request(PLAIN, "broken", b"1")])
@example([request(PLAIN, "nothing", b"1"), BYE])
def test_nobody_can_tell(served, script):
    runner, app, connecting = served

    async def played(protocol):
        return await play(app, await connecting(protocol), script)

    expected = runner.run(played(H11Protocol))
    Http1Protocol.heads = RequestHeads()
    for _ in range(2):  # the first time nothing is known, the second time whatever can be
        assert runner.run(played(Http1Protocol)) == expected


@pytest.fixture(autouse=True)
def no_known_heads(monkeypatch):
    monkeypatch.setattr(Http1Protocol, "heads", RequestHeads())


@pytest.fixture
def told_h11(monkeypatch):
    """What h11 has been told, by all connections to servers."""
    told, receive = [], h11.Connection.receive_data

    def spied(connection, data):
        told.append(bytes(data))
        receive(connection, data)

    monkeypatch.setattr(h11.Connection, "receive_data", spied)
    return told


@pytest.mark.parametrize("kind", ["direct", "whole", "asgi"])
async def test_h11_reads_a_head_once(kind, told_h11):
    app = App()
    async with serving(app) as connecting:
        reader, writer = await connecting()
        for body in (b"first", b"second one", b"third"):
            writer.write(request(PLAIN, kind, body))
            end = b"0\r\n\r\n" if kind == "direct" else b"ok" * (len(body) if kind == "whole" else 1)
            assert (await reader.readuntil(end)).startswith(b"HTTP/1.1 20")
    assert [body for _, body in app.asked] == [b"first", b"second one", b"third"]
    later = [data for data in told_h11[1:] if data]
    # An answer by plain ASGI is h11's to write, so it hears of the request then; the body is nothing to it.
    assert later == ([] if kind != "asgi" else [request(PLAIN, kind, bytes(10)), request(PLAIN, kind, bytes(5))])


async def test_what_comes_during_an_answer_is_the_next_request(told_h11):
    """Also where the answer began before h11 heard of its request."""
    go_on, begun = asyncio.Event(), []

    async def app(scope, receive, send):
        if scope["type"] == "http":
            begun.append((await receive())["body"])
            async with open_stream(send, [(b"a", b"b")], lambda: None, 1 << 30) as stream:
                stream.write(begun[-1])
                await go_on.wait()
                await stream.end(b"!")

    async with serving(app) as connecting, asyncio.timeout(10):
        reader, writer = await connecting()
        go_on.set()
        for body in (b"known", b"from now on"):
            writer.write(request(PLAIN, "direct", body))
            await reader.readuntil(b"0\r\n\r\n")
        go_on.clear()
        writer.write(request(PLAIN, "direct", b"slow"))
        await reader.readuntil(b"slow\r\n")
        writer.write(early := request(PLAIN, "direct", b"early"))
        while early not in told_h11:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert begun[-1] == b"slow"
        go_on.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"1\r\n!\r\n0\r\n\r\n"
        assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"5\r\nearly\r\n1\r\n!\r\n0\r\n\r\n")


async def test_a_client_that_leaves_a_known_request_is_noticed():
    left = asyncio.Event()

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        message = await receive()
        if message["body"] == b"wait":
            while message["type"] != "http.disconnect":
                message = await receive()
            left.set()
            return
        async with open_stream(send, [], lambda: None, 1 << 30) as stream:
            await stream.end(b"!")

    async with serving(app) as connecting:
        reader, writer = await connecting()
        writer.write(request(PLAIN, "direct", b"once"))
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(request(PLAIN, "direct", b"wait"))
        await writer.drain()
        writer.close()
        async with asyncio.timeout(10):
            await left.wait()
