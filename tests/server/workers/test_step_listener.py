"""What the router hears of a worker's steps, in which order, and of its whole set of blocks; over real sockets."""

import pytest

from tests.server.workers.conftest import Sink, a_request, until
from trtserve.plugins.api import (
    BlockHash,
    FinishReason,
    KVRemoved,
    Output,
    PassStats,
    RequestId,
    StepOutputs,
    WorkerId,
    WorkerLoad,
)
from trtserve.server.errors import WorkerLost
from trtserve.server.workers import wire
from trtserve.server.workers.warm_up import FIRST_REQUEST_ID

REMOVED = KVRemoved((BlockHash(7), BlockHash(2**64 - 1)))


def step(number, *outputs, first_event=0, events=(), stats=None):
    return wire.step_of(number, first_event, StepOutputs(outputs, WorkerLoad(running=number), events, stats))


class ReportingSink(Sink):
    """Tells the listener's list what the request got, so that all is in one order."""

    def __init__(self, reports):
        super().__init__()
        self._reports = reports

    def push(self, token_ids, logprobs):
        self._reports.append(("tokens", list(token_ids)))


@pytest.mark.parametrize("tokens", [[5], [5, 6]], ids=["one token", "more"])
async def test_tokens_go_on_before_the_step_is_told(house, running, tokens):
    peer, client = await house.worker()
    reports = house.listener.reports
    run = running(client, a_request(1), ReportingSink(reports))
    await peer.hears()
    reports.clear()
    output = Output(RequestId(1), tokens, FinishReason.LENGTH, cached_tokens=2)
    peer.say(step(4, output, first_event=3, events=[REMOVED]))
    await run
    told = [("events", 3, (wire.event_of(REMOVED),)), ("prompt done", 1, 2), ("step", 4)]
    assert reports == [("tokens", tokens), *told]


async def test_steps_that_come_together_are_told_after_the_tokens_of_all(house, running):
    """And before whatever else the worker says, and before the end of a request is noticed."""
    peer, client = await house.worker()
    reports = house.listener.reports
    run = running(client, a_request(1), ReportingSink(reports))
    run.add_done_callback(lambda run: reports.append(("over",)))
    await peer.hears()
    reports.clear()
    steps = [step(number, Output(RequestId(1), [number]), first_event=3) for number in (1, 2)]
    last = step(3, Output(RequestId(1), [3], FinishReason.LENGTH), first_event=3)
    messages = [*steps, wire.blocks_of(3, [BlockHash(1)]), last]
    peer.say_bytes(wire.batch_of(list(map(wire.encode, messages))))
    await run
    await until(lambda: ("over",) in reports)
    assert reports == [
        *[("tokens", [1]), ("tokens", [2]), ("step", 1), ("step", 2), ("blocks", 3, [1])],
        *[("tokens", [3]), ("step", 3), ("over",)],
    ]


async def test_a_step_whose_rest_makes_no_sense_ends_its_worker(house, running):
    peer, client = await house.worker()

    def refuse(client, step):
        raise ValueError("no such rank")

    house.listener.on_step = refuse
    run = running(client, a_request(1), sink := Sink())
    await peer.hears()
    peer.say(step(1, Output(RequestId(1), [5])))
    with pytest.raises(WorkerLost, match="message \\(step\\) that makes no sense: no such rank"):
        await run
    assert (sink.tokens, client.state) == ([5], "gone")


async def test_a_plain_step_is_one_call(house, running):
    peer, client = await house.worker()
    house.listener.reports.clear()
    peer.say(step(1, Output(RequestId(1), [5]), Output(RequestId(2), [6])))
    await until(lambda: client.steps == 1)
    assert house.listener.reports == [("step", 1)]


async def test_what_a_step_says_of_its_pass(house):
    told = []
    house.listener.on_step = lambda client, step: told.append((step.stats, step.load, step.num_rows, step.num_tokens))
    peer, client = await house.worker()
    stats = PassStats(0.5, 10, 2, 300)
    peer.say(step(1, Output(RequestId(1), [5, 6, 7]), Output(RequestId(2), [8]), Output(RequestId(3)), stats=stats))
    peer.say(step(2))
    await until(lambda: client.steps == 2)
    assert told == [(stats, WorkerLoad(running=1), 2, 4), (None, WorkerLoad(running=2), 0, 0)]


async def test_the_warm_up_is_heard_before_the_worker_is_ready(house):
    peer = house.peer()
    peer.say(peer.hello)
    await peer.hears()
    peer.say(step(1, Output(FIRST_REQUEST_ID, [5], FinishReason.LENGTH, cached_tokens=0), events=[REMOVED]))
    client = house.pool[WorkerId("agg-0")]
    await until(lambda: client.steps == 1)
    assert (client.state, client.num_running) == ("starting", 0)
    assert [report[0] for report in house.listener.reports] == ["connected", "events", "prompt done", "step"]


async def test_every_process_begins_anew(house):
    _, client = await house.worker()
    house.pool.gone(client, "was killed")
    await house.worker(incarnation=2)
    assert house.listener.reports == [("connected", "agg-0")] * 2


async def test_ends_of_requests_that_nobody_waits_for_are_told(house, running):
    peer, client = await house.worker()
    run = running(client, a_request(1))
    await peer.hears()
    run.cancel()
    await peer.hears()
    peer.say(step(1, Output(RequestId(1), (), FinishReason.CANCELLED, cached_tokens=3)))
    await until(lambda: client.steps == 1)
    assert house.listener.reports[1:] == [("prompt done", 1, 3), ("step", 1)]


async def test_blocks_are_asked_for_and_told_in_their_place(house):
    peer, client = await house.worker()
    house.listener.reports.clear()
    assert client.send_resync() is True
    assert await peer.hears() == wire.Resync()
    hashes = [BlockHash(1), BlockHash(2**64 - 1)]
    peer.say(step(1))
    peer.say(wire.blocks_of(9, hashes))
    peer.say(step(2, first_event=9))
    await until(lambda: client.steps == 2)
    assert house.listener.reports == [("step", 1), ("blocks", 9, hashes), ("step", 2)]


async def test_nobody_to_ask(house):
    _, client = await house.worker()
    house.pool.gone(client, "was killed")
    assert client.send_resync() is False


@pytest.mark.parametrize("bad", [wire.Blocks(3, b"\0" * 12), wire.Blocks(-1, b"")], ids=["half a hash", "number"])
async def test_blocks_that_make_no_sense_end_their_worker(house, bad):
    peer, client = await house.worker()
    peer.say(bad)
    await until(lambda: client.state == "gone")
    assert "message (blocks) that makes no sense" in client.phase
    assert house.listener.heard[-1] == ("gone", "agg-0")
    assert all(report[0] != "blocks" for report in house.listener.reports)
