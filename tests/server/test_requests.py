"""The table of live requests: entering, cancelling by id, draining, the time limit."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from trtserve.server.errors import Overloaded, RequestCancelled, RequestTimedOut
from trtserve.server.requests import LiveRequests


@asynccontextmanager
async def answering(live, *public_ids):
    """Tasks that are inside `enter` and wait there; each ends as its request does."""

    async def answer(public_id, entered):
        with live.enter(public_id) as request:
            entered.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if request.reason is None:
                    raise
                return request.reason

    tasks = []
    for public_id in public_ids:
        entered = asyncio.Event()
        tasks.append(asyncio.create_task(answer(public_id, entered)))
        await entered.wait()
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(live) == 0


async def test_requests_are_live_inside_the_block_only():
    live = LiveRequests()
    with live.enter("a"):
        assert len(live) == 1
        with live.enter("b"):
            assert len(live) == 2
    assert len(live) == 0
    with pytest.raises(ZeroDivisionError), live.enter("a"):
        _ = 1 / 0
    assert len(live) == 0


async def test_cancelling_by_id_tells_the_reason():
    live, reason = LiveRequests(), RequestCancelled("by its id")
    async with answering(live, "a", "b") as (first, second):
        assert live.cancel("a", reason) is True
        assert await first is reason
        assert not second.done() and live.cancel("a", reason) is False
    assert live.cancel("never", reason) is False


async def test_only_the_first_reason_counts():
    live = LiveRequests()
    one, other = RequestCancelled("one"), RequestCancelled("other")
    async with answering(live, "a") as (task,):
        live.cancel("a", one)
        live.cancel("a", other)
        assert await task is one


async def test_two_clients_may_choose_the_same_id():
    live, reason = LiveRequests(), RequestCancelled("x")
    async with answering(live, "same", "same") as tasks:
        assert len(live) == 2
        assert live.cancel("same", reason) and not live.cancel("same 2", reason)
        assert [await task for task in tasks] == [reason, reason]
    assert len(live) == 0 and not live.cancel("same", reason)


async def test_the_second_under_an_id_is_found_when_the_first_is_over():
    live, reason = LiveRequests(), RequestCancelled("x")
    async with answering(live, "same") as firsts, answering(live, "same") as seconds:
        firsts[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await firsts[0]
        assert live.cancel("same", reason)
        assert await seconds[0] is reason


async def test_idle_waits_for_the_last_one():
    live = LiveRequests()
    await live.idle()
    async with answering(live, "a", "b") as tasks:
        idle = asyncio.create_task(live.idle())
        tasks[0].cancel()
        await asyncio.wait({tasks[0]})
        assert not idle.done()
        tasks[1].cancel()
        await idle


async def test_a_server_that_drains_takes_no_more():
    live = LiveRequests()
    async with answering(live, "a"):
        live.check_open()
        live.draining = True
        with pytest.raises(Overloaded, match="shutting down") as caught:
            live.check_open()
        assert caught.value.code == "draining" and len(live) == 1


async def test_each_request_has_its_time():
    live = LiveRequests(timeout_s=0.05)
    async with answering(live, "a", "b") as tasks:
        reasons = await asyncio.gather(*tasks)
        assert all(isinstance(reason, RequestTimedOut) for reason in reasons)
        assert "longer than 0.05 s" in str(reasons[0]) and "--request-timeout" in str(reasons[0])
    # The one timer runs again for those that come later.
    async with answering(live, "c") as (task,):
        assert isinstance(await task, RequestTimedOut)


async def test_the_time_of_one_is_not_the_time_of_the_next(monkeypatch):
    loop = asyncio.get_running_loop()
    now_s, ahead_s = loop.time, [0.0]
    monkeypatch.setattr(loop, "time", lambda: now_s() + ahead_s[0])
    live = LiveRequests(timeout_s=100)
    async with answering(live, "a") as (first,):
        ahead_s[0] = 50
        async with answering(live, "b") as (second,):
            ahead_s[0] = 101
            assert isinstance(await first, RequestTimedOut)
            assert not second.done()
            ahead_s[0] = 151
            assert isinstance(await second, RequestTimedOut)


async def test_sequences_are_numbered_from_one():
    live = LiveRequests()
    assert [live.new_sequence_id() for _ in range(3)] == [1, 2, 3]
