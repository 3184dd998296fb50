"""Streams over ASGI alone, and how clients that leave are noticed."""

import asyncio

from tests.server.api.connections import BIG, HEADERS, Recorder, direct, get, no_one, response, serving
from trtserve.server.api.hypercorn_path import find_path
from trtserve.server.api.stream import DisconnectWatch, open_stream


async def test_plain_asgi_gets_a_start_a_body_and_an_end():
    send = Recorder()
    assert find_path(send) is None
    async with open_stream(send, HEADERS, no_one, BIG) as stream:
        stream.write(b"a")
        stream.framed(b"(", b")")(b"b")
        await stream.end(b"c")
    start, *bodies = send.messages
    assert start == {"type": "http.response.start", "status": 200, "headers": HEADERS}
    assert send.body == b"a(b)c"
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]


async def test_what_waits_for_a_slow_send_is_joined():
    send = Recorder()
    send.open.clear()
    async with open_stream(send, HEADERS, no_one, BIG) as stream:
        for _ in range(10):
            stream.write(b"z")
            await asyncio.sleep(0)
        send.open.set()
        await stream.end()
    assert [message.get("body") for message in send.messages] == [None, b"z" * 10, b""]


async def test_a_send_that_stays_slow_is_given_up():
    send, calls = Recorder(), []
    send.open.clear()
    async with open_stream(send, HEADERS, lambda: calls.append(True), 100) as stream:
        for _ in range(30):
            stream.write(b"0123456789")
        async with asyncio.timeout(5):
            await stream.end(b"x")
    assert calls == [True] and send.messages == []


async def test_leaving_a_plain_stream_early_leaves_no_task():
    send = Recorder()
    send.open.clear()
    before = asyncio.all_tasks()
    async with open_stream(send, HEADERS, no_one, BIG) as stream:
        stream.write(b"never sent")
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_client_that_leaves_is_noticed_while_the_answer_runs():
    left, running = asyncio.Event(), asyncio.Event()

    async def answer(scope, receive, send):
        async with DisconnectWatch(receive, send, left.set):
            running.set()
            await left.wait()

    async with serving(answer) as connect:
        _, writer = await connect()
        writer.write(get())
        await running.wait()
        writer.transport.abort()
        async with asyncio.timeout(5):
            await left.wait()


async def test_a_complete_answer_is_no_leaving():
    calls, done = [], asyncio.Event()

    async def answer(scope, receive, send):
        async with DisconnectWatch(receive, send, lambda: calls.append(True)) as watch:
            async with direct(send, HEADERS, no_one, BIG) as stream:
                stream.write(b"all")
                watch.stop()
                await stream.end()
        done.set()

    async with serving(answer) as connect:
        reader, writer = await connect()
        writer.write(get())
        await response(reader)
        await done.wait()
        writer.transport.abort()
    assert calls == []


async def test_leaving_is_noticed_under_any_asgi_server():
    messages, left = asyncio.Queue(), asyncio.Event()
    async with DisconnectWatch(messages.get, Recorder(), left.set):
        messages.put_nowait({"type": "http.request", "body": b""})
        messages.put_nowait({"type": "http.disconnect"})
        await left.wait()
    calls = []
    async with DisconnectWatch(messages.get, Recorder(), lambda: calls.append(True)) as watch:
        watch.stop()
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.sleep(0)
    assert calls == []
