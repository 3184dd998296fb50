"""Requests on a worker: their tokens in order, one end each, and nothing left behind; over real sockets."""

import asyncio
import time

import pytest

from tests.server.workers.conftest import Listener, Sink, a_request, until
from trtserve.plugins.api import (
    Finish,
    FinishReason,
    Output,
    RequestId,
    Role,
    StepOutputs,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
)
from trtserve.server.errors import WorkerLost
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient


def step(number, *outputs, load=None):
    return wire.step_of(number, 0, StepOutputs(outputs, load or WorkerLoad()))


def ids(*numbers):
    return [RequestId(number) for number in numbers]


async def test_tokens_arrive_in_order_and_the_end_resolves(house, running):
    peer, client = await house.worker()
    sink = Sink()
    run = running(client, a_request(7), sink)
    submit = await peer.hears()
    assert wire.request_of(submit) == a_request(7)
    peer.say(step(1, Output(RequestId(7), [11], cached_tokens=2)))
    peer.say(step(2, Output(RequestId(7), [12, 13])))
    peer.say(step(3, Output(RequestId(7), [14], FinishReason.STOP, stop_token_id=14), load=WorkerLoad(free_blocks=5)))
    assert await run == Finish(FinishReason.STOP, 14)
    assert (sink.tokens, sink.cached_tokens) == ([11, 12, 13, 14], 2)
    assert (client.num_running, client.steps, client.load.free_blocks) == (0, 3, 5)


async def test_rows_of_one_step_go_to_their_requests(house, running):
    peer, client = await house.worker()
    sinks = {number: Sink() for number in (1, 2, 3)}
    runs = [running(client, a_request(number), sink) for number, sink in sinks.items()]
    for _ in runs:
        await peer.hears()
    logprobs = (TokenLogprob(5, -0.5), TokenLogprob(6, -0.25))
    peer.say(step(1, *(Output(number, [number]) for number in ids(3, 1, 2))))
    peer.say(
        step(
            2, Output(RequestId(2), [5, 6], logprobs=logprobs), Output(RequestId(99), [1, 1]), Output(RequestId(1), [8])
        )
    )
    peer.say(step(3, *(Output(number, (), FinishReason.LENGTH) for number in ids(1, 2, 3))))
    await asyncio.gather(*runs)
    assert {number: sink.tokens for number, sink in sinks.items()} == {1: [1, 8], 2: [2, 5, 6], 3: [3]}
    assert [sink.logprobs for sink in sinks.values()] == [[], list(logprobs), []]


async def test_errors_of_one_request_are_its_own(house, running):
    peer, client = await house.worker()
    run, other = running(client, a_request(1)), running(client, a_request(2))
    await peer.hears(), await peer.hears()
    peer.say(step(1, Output(RequestId(1), (), FinishReason.ERROR, error="too long")))
    assert await run == Finish(FinishReason.ERROR, None, "too long")
    assert not other.done() and client.num_running == 1


async def test_cancelling_the_call_cancels_on_the_worker(house, running):
    peer, client = await house.worker()
    sink = Sink()
    run = running(client, a_request(1), sink)
    await peer.hears()
    run.cancel()
    assert await peer.hears() == wire.Cancel(RequestId(1))
    assert run.cancelled()
    # The worker holds it until it says otherwise, and its tokens go nowhere.
    assert client.num_running == 1
    peer.say(step(1, Output(RequestId(1), [9])))
    peer.say(step(2, Output(RequestId(1), (), FinishReason.CANCELLED)))
    await until(lambda: client.num_running == 0)
    assert sink.tokens == []


async def test_a_call_cancelled_before_it_ran_submits_nothing(house, running):
    peer, client = await house.worker()
    running(client, a_request(1)).cancel()
    running(client, a_request(2))
    assert (await peer.hears()).request_id == 2
    assert client.num_running == 1


async def test_an_end_that_crosses_the_cancel_is_enough(house, running):
    peer, client = await house.worker()
    run = running(client, a_request(1))
    await peer.hears()
    peer.say(step(1, Output(RequestId(1), [5], FinishReason.LENGTH)))
    await until(lambda: client.steps == 1)
    # The answer is there, and the one who waits for it is cancelled in the same turn or just after.
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert client.num_running == 0


async def test_stopping_ends_the_call_at_once(house, running):
    peer, client = await house.worker()
    run = running(client, a_request(1))
    await peer.hears()
    assert client.stop(RequestId(1)) is True
    assert await run == Finish(FinishReason.STOP)
    assert await peer.hears() == wire.Cancel(RequestId(1))
    assert client.stop(RequestId(1)) is False and client.num_running == 1
    peer.say(step(1, Output(RequestId(1), (), FinishReason.CANCELLED)))
    await until(lambda: client.num_running == 0)


async def test_a_lost_worker_fails_all_its_requests(house, running):
    peer, client = await house.worker()
    runs = [running(client, a_request(number)) for number in range(1, 6)]
    for _ in runs:
        await peer.hears()
    runs[0].cancel()
    await peer.hears()
    house.pool.gone(client, "was killed by SIGKILL")
    ends = await asyncio.gather(*runs, return_exceptions=True)
    assert isinstance(ends[0], asyncio.CancelledError)
    assert all(isinstance(end, WorkerLost) and "SIGKILL" in str(end) for end in ends[1:])
    assert client.num_running == 0


async def test_a_worker_that_is_not_ready_takes_nothing():
    client = WorkerClient(WorkerId("agg-0"), Role.AGG, Listener())
    with pytest.raises(WorkerLost, match="agg-0 is not reachable: not started"):
        await client.run(a_request(), Sink())
    assert client.num_running == 0


async def test_a_worker_whose_connection_broke_is_lost(house):
    peer, client = await house.worker()
    peer.socket.close()

    async def is_unreachable():
        try:
            await asyncio.wait_for(client.run(a_request(), Sink()), 0.05)
        except WorkerLost:
            return True
        except TimeoutError:
            return False

    async with asyncio.timeout(5):
        while not await is_unreachable():
            pass
    assert client.state == "gone", "the next request goes elsewhere, though nobody has missed the process yet"
    assert house.listener.heard[-1] == ("gone", "agg-0")


async def test_trouble_is_silence_or_standing_still_with_work(house, running):
    peer, client = await house.worker()
    now_s = time.monotonic()
    assert client.trouble(now_s + 5, 10, 1) is None  # idle: no step is no trouble
    assert client.trouble(now_s + 11, 10, 100) == "no heartbeat for 11 s"
    running(client, a_request())
    await peer.hears()
    assert "made no step for" in client.trouble(client.last_step_s + 3, 10, 2)
    peer.say(wire.Heartbeat(5, WorkerLoad()))
    before_s = client.last_step_s
    await until(lambda: client.steps == 5)
    assert client.last_step_s > before_s


async def test_only_steps_count_as_progress(house, running):
    peer, client = await house.worker()
    running(client, a_request())
    await peer.hears()
    stood_still_since_s = client.last_step_s
    peer.say(wire.Heartbeat(0, WorkerLoad(waiting=1)))
    await until(lambda: client.load.waiting == 1)
    assert client.last_step_s == stood_still_since_s
