"""The listening socket and hypercorn around an application: bound early, served, stopped."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from trtserve.server.http import AddressError, bind, serve_http
from trtserve.settings.schema import Settings


async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


async def is_listening(port):
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@asynccontextmanager
async def serving(app, **changes):
    bound = bind("127.0.0.1", 0)
    port, stop = bound.getsockname()[1], asyncio.Event()
    server = asyncio.create_task(serve_http(app, bound, Settings.model_construct(**changes), stop))
    while not await is_listening(port):
        assert not server.done(), server.exception()
    try:
        yield port
    finally:
        stop.set()
        async with asyncio.timeout(10):
            await server


async def head_and_body(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    return head, await reader.readexactly(2)


async def test_requests_are_served_on_one_connection():
    async with serving(hello) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            head, body = await head_and_body(reader)
            assert head.startswith(b"HTTP/1.1 200") and body == b"hi"
            # What nobody needs is not sent.
            assert b"server:" not in head.lower() and b"date:" not in head.lower()
        writer.close()
        await writer.wait_closed()


async def test_a_head_over_the_limit_is_refused():
    async with serving(hello, max_header_kib=1) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 5000)
        assert (await reader.readline()).startswith(b"HTTP/1.1 4")
        writer.close()
        await writer.wait_closed()


async def test_stopping_closes_idle_connections_and_the_address():
    async with serving(hello) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await head_and_body(reader)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_an_address_in_use_is_found_before_anything_is_loaded():
    async with serving(hello) as port:
        with pytest.raises(AddressError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.77", "no-such-host.invalid"])
def test_an_address_of_nobody_here(host):
    with pytest.raises(AddressError, match=host):
        bind(host, 0)


def test_addresses_of_both_families():
    for host in ("127.0.0.1", "localhost"):
        bind(host, 0).close()
    try:
        bind("::1", 0).close()
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_a_connection_that_stays_idle_is_closed():
    async with serving(hello, keep_alive_timeout=0.5) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await head_and_body(reader)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_connection_that_is_busy_for_longer_than_idle_ones_may_last_is_not_closed():
    go_on = asyncio.Event()

    async def slow(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await go_on.wait()
        await hello(scope, receive, send)

    async with serving(slow, keep_alive_timeout=0.5) as port:
        idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(5):
            assert await idle_reader.read() == b""  # the other one's time is over
        go_on.set()
        assert (await head_and_body(reader))[1] == b"hi"
        for each in (writer, idle_writer):
            each.close()
            await each.wait_closed()


async def test_nothing_is_left_of_a_connection_that_its_client_closed():
    async with serving(hello, keep_alive_timeout=600) as port:
        before = len(asyncio.all_tasks())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await head_and_body(reader)
        assert len(asyncio.all_tasks()) > before
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > before:  # noqa: ASYNC110  # nothing tells of a task's end from outside
                await asyncio.sleep(0)
