"""Events reach the socket the short way and the plain way alike: a real hypercorn, real sockets, every byte."""

import asyncio

import h11
import pytest
import uvloop

from tests.server.api.connections import BIG, HEADERS, SEE_ALL, direct, get, no_one, plain, response, serving
from trtserve.server.api.hypercorn_path import find_path
from trtserve.server.api.stream import AsgiStream, open_stream


async def sent(stream):
    """Wait until nothing is on its way inside."""
    while isinstance(stream, AsgiStream) and stream._buffered_bytes:  # noqa: ASYNC110  # its task tells nobody
        await asyncio.sleep(0)


@pytest.mark.parametrize("make", [direct, plain])
async def test_both_ways_say_the_same(make):
    async def answer(scope, receive, send):
        async with make(send, HEADERS, no_one, BIG) as stream:
            assert not stream.started
            for event in SEE_ALL:
                stream.write(event)
                assert stream.started
                await sent(stream)  # so that each is a piece of its own on both ways
            await stream.end()

    async with serving(answer) as connect:
        reader, writer = await connect()
        writer.write(get())
        head, chunks = await response(reader)
    assert head == (
        b"HTTP/1.1 200 \r\ncontent-type: text/event-stream\r\nx-request-id: 7\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert chunks == SEE_ALL


@pytest.mark.parametrize("make", [direct, plain])
async def test_every_way_to_write_keeps_order_and_the_connection(make):
    """Framed pieces, a last piece with the end, an answer that is only that; one connection for all."""

    async def answer(scope, receive, send):
        async with make(send, HEADERS, no_one, BIG) as stream:
            if scope["method"] == "GET":
                stream.write(b"first")
                framed = stream.framed(b"<", b">")
                for piece in (b"a", b"", b"b"):
                    framed(piece)
                stream.write(b"then")
            await stream.end(b"last")
            await stream.end(b"not once more")
            stream.write(b"nor this")

    async with serving(answer) as connect:
        reader, writer = await connect()
        for method, body in (
            (b"GET", b"first<a><><b>thenlast"),
            (b"DELETE", b"last"),
            (b"GET", b"first<a><><b>thenlast"),
        ):
            writer.write(get(method=method))
            _, chunks = await response(reader)
            assert b"".join(chunks) == body


@pytest.mark.parametrize("make", [direct, plain])
async def test_what_never_started_leaves_the_answer_open(make):
    async def answer(scope, receive, send):
        async with make(send, HEADERS, no_one, BIG) as stream:
            await stream.end()
            assert not stream.started
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})

    async with serving(answer) as connect:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(get())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503") and await reader.readexactly(2) == b"no"


async def test_the_client_side_of_h11_agrees():
    """A strict parser reads what was written past ASGI, twice on one connection."""

    async def answer(scope, receive, send):
        async with direct(send, HEADERS, no_one, BIG) as stream:
            for number in range(50):
                stream.write(b"%d" % number * (number * 40 + 1))
            await stream.end(b"end")

    async with serving(answer) as connect:
        reader, writer = await connect()
        client = h11.Connection(h11.CLIENT)
        for _ in range(2):
            writer.write(client.send(h11.Request(method="GET", target="/", headers=[("host", "x")])))
            writer.write(client.send(h11.EndOfMessage()))
            body = b""
            while type(event := client.next_event()) is not h11.EndOfMessage:
                if event is h11.NEED_DATA:
                    client.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Data):
                    body += event.data
            assert body == b"".join(b"%d" % number * (number * 40 + 1) for number in range(50)) + b"end"
            client.start_next_cycle()


async def test_heads_are_those_of_h11_each_time():
    """The first is rendered by h11, later ones are known, prepared or not; each has its own request id. Who closes is
    told so."""
    headers = [*HEADERS[:1], (b"x-test", b"known heads")]  # of this test only

    async def answer(scope, receive, send):
        name = dict(scope["headers"])[b"name"]
        async with direct(send, [*headers, (b"x-request-id", name)], no_one, BIG) as stream:
            if name != b"b":
                stream.prepare()
            if name != b"at once":
                stream.write(b"first")
            stream.prepare()  # too late, which does no harm
            await stream.end(b"last")
        stream.prepare()

    async def ask(reader, writer, name, more=b""):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nname: " + name + b"\r\n" + more + b"\r\n")
        return await response(reader)

    async with serving(answer) as connect:
        reader, writer = await connect()
        names = [b"a", b"b", b"at once", b"c"]
        answers = [await ask(reader, writer, name) for name in names]
        closed, _ = await ask(reader, writer, b"d", b"Connection: close\r\n")
        assert await reader.read() == b""
    assert [b"".join(chunks) for _, chunks in answers] == [b"firstlast", b"firstlast", b"last", b"firstlast"]
    heads = [head.replace(b"x-request-id: " + name, b"ID") for name, (head, _) in zip(names, answers, strict=True)]
    assert len(set(heads)) == 1
    assert closed.replace(b"x-request-id: d", b"ID").replace(b"Connection: close\r\n", b"") == heads[0] != closed


@pytest.mark.parametrize(("version", "method"), [(b"1.0", b"GET"), (b"1.1", b"HEAD")])
async def test_where_chunks_do_not_go_asgi_does(version, method):
    kinds = []

    async def answer(scope, receive, send):
        async with open_stream(send, HEADERS, no_one, BIG) as stream:
            kinds.append(type(stream))
            stream.write(b"hello")
            await stream.end()

    async with serving(answer) as connect:
        reader, writer = await connect()
        writer.write(get(version, method))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        if method == b"GET":
            assert await reader.read() == b"hello"
    assert kinds == [AsgiStream]


async def test_a_client_that_does_not_read_is_given_up_once():
    gave_up, calls = asyncio.Event(), []

    def too_slow():
        calls.append(True)
        gave_up.set()

    async def answer(scope, receive, send):
        async with direct(send, HEADERS, too_slow, 100_000) as stream:
            framed = stream.framed(b"", b"")
            for _ in range(200):
                stream.write(b"x" * 50_000)
                framed(b"y" * 50_000)
                await asyncio.sleep(0)
            await gave_up.wait()
            await stream.end(b"nothing more")

    async with serving(answer) as connect:
        reader, writer = await connect()
        writer.write(get())
        async with asyncio.timeout(10):
            await gave_up.wait()
        # The client must not take what it has for the whole answer.
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await response(reader)
    assert calls == [True]


async def test_a_whole_answer_waits_until_its_client_has_read_enough_of_it():
    content, written, ended = b"0123456789" * 4_000_000, asyncio.Event(), asyncio.Event()

    async def answer(scope, receive, send):
        path = find_path(send)
        asyncio.get_running_loop().call_soon(written.set)
        await path.whole(HEADERS, content)
        ended.set()

    async with serving(answer) as connect, asyncio.timeout(20):
        reader, writer = await connect()
        for _ in range(2):  # the head is h11's, then known
            writer.transport.pause_reading()
            writer.write(get(method=b"POST", more=b"content-length: 0\r\n"))
            await written.wait()
            assert not ended.is_set()
            writer.transport.resume_reading()
            head = await reader.readuntil(b"\r\n\r\n")
            assert sorted(head.split(b"\r\n")[1:-2]) == [
                b"content-length: 40000000",
                b"content-type: text/event-stream",
                b"x-request-id: 7",
            ]
            assert await reader.readexactly(len(content)) == content
            await ended.wait()
            written.clear()
            ended.clear()


@pytest.mark.parametrize("is_known", [False, True])
def test_beginning_on_what_uvloop_has_closed_is_no_error(is_known):
    headers = [*HEADERS, (b"x-test", b"closed %d" % is_known)]
    survived = []

    async def answer(scope, receive, send):
        async with direct(send, headers, no_one, BIG) as stream:
            if scope["method"] == "GET":
                stream._transport.abort()
                for _ in range(10):
                    await asyncio.sleep(0)
            stream.write(b"one")
            await stream.end(b"two")
            survived.append(stream.started)

    async def run():
        async with serving(answer) as connect:
            reader, writer = await connect()
            if is_known:
                writer.write(get(method=b"DELETE"))
                await response(reader)
            writer.write(get())
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await response(reader)

    uvloop.run(run())
    assert survived == [True] * (1 + is_known)


@pytest.mark.parametrize("first", ["write", "framed", "end"])
def test_writing_to_what_uvloop_has_closed_is_no_error(first):
    """uvloop's transports raise where asyncio's say nothing."""
    survived = []

    async def answer(scope, receive, send):
        async with direct(send, HEADERS, no_one, BIG) as stream:
            stream.write(b"one")
            framed, transport = stream.framed(b"<", b">"), stream._transport
            transport.abort()
            for _ in range(10):
                await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="closed"):
                transport.write(b"raises")
            {"write": stream.write, "framed": framed, "end": lambda data: None}[first](b"two")
            await stream.end(b"three")
            survived.append(True)

    async def run():
        async with serving(answer) as connect:
            reader, writer = await connect()
            writer.write(get())
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
                await response(reader)

    uvloop.run(run())
    assert survived == [True]
