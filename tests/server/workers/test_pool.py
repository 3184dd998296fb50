"""Who may join, whose messages count, and what the router hears of it; over real sockets."""

from dataclasses import replace

import msgspec
import pytest

from tests.server.workers.conftest import HELLO, INFO, Sink, a_request, until
from trtserve.plugins.api import FinishReason, Output, RequestId, Role, StepOutputs, WorkerId, WorkerLoad
from trtserve.server.errors import WorkerLost
from trtserve.server.workers import wire


def step(number, *outputs, load=None):
    return wire.step_of(number, 0, StepOutputs(outputs, load or WorkerLoad()))


async def test_a_worker_joins(house):
    house.pool.add(WorkerId("agg-0"), Role.AGG)
    peer, client = await house.worker()
    assert house.listener.heard == [("ready", "agg-0")]
    assert (client.info, client.phase, client.state) == (INFO, "ready", "ready")
    peer.say(wire.Heartbeat(0, WorkerLoad(running=3)))
    await until(lambda: client.load.running == 3)


async def test_a_worker_started_by_hand_needs_no_plan(house):
    _, client = await house.worker(worker_id="elsewhere-7", role=Role.DECODE)
    assert (client.worker_id, client.role) == ("elsewhere-7", Role.DECODE)
    assert [one.worker_id for one in house.pool] == ["elsewhere-7"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wire_version": wire.WIRE_VERSION + 1}, "install the same trtserve on both"),
        ({"token": "another"}, "its token is not this server's"),
        ({"token": "n\xf6"}, "its token is not this server's"),
        ({"model_fingerprint": "other"}, "it has model other, the server model"),
        ({"tokenizer_fingerprint": "other"}, "it has tokenizer other"),
        ({"role": Role.PREFILL}, "it says --role prefill, but agg-0 is a agg worker here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_worker_that_does_not_fit_is_refused(house, changes, reason):
    house.pool.add(WorkerId("agg-0"), Role.AGG)
    peer = house.peer(**changes)
    peer.say(peer.hello)
    refused = await peer.hears()
    assert isinstance(refused, wire.Refused) and reason in refused.reason
    # And what it says afterwards is nobody's.
    peer.say(wire.Ready(INFO))
    peer.say(wire.Progress("sneaking in"))
    await house.worker(worker_id="witness")
    assert house.listener.heard == [("ready", "witness")]
    assert house.pool[WorkerId("agg-0")].phase == "not started"


async def test_who_is_refused_writes_no_lines_of_the_log(house, caplog):
    peer = house.peer(worker_id="agg-0\nINFO all is well", token="x" * 10_000, trtserve_version="1\n" * 10_000)
    for version in (wire.WIRE_VERSION, 0):
        peer.say(msgspec.structs.replace(peer.hello, wire_version=version))
        assert isinstance(await peer.hears(), wire.Refused)
    assert all("\n" not in line and len(line) < 1000 for line in caplog.messages) and len(caplog.messages) == 2


async def test_blocks_must_have_one_size(house):
    await house.worker()
    other = house.peer(worker_id="agg-1")
    other.say(other.hello)
    assert await other.hears() == wire.Welcome()
    other.say(wire.Ready(replace(INFO, block_size=32)))
    refused = await other.hears()
    assert isinstance(refused, wire.Refused) and "32 tokens, those of agg-0 16" in refused.reason
    assert house.listener.heard == [("ready", "agg-0")]


@pytest.mark.parametrize("changes", [{"moves_kv": False}, {"kv_fingerprint": "NIXL, fp8"}])
async def test_engines_that_move_kv_must_be_alike(house, changes):
    moving = replace(INFO, moves_kv=True, kv_fingerprint="UCX, fp8")
    first = house.peer(worker_id="prefill-0", role=Role.PREFILL)
    first.say(first.hello)
    assert await first.hears() == wire.Welcome()
    first.say(wire.Ready(moving))
    await until(lambda: house.pool[WorkerId("prefill-0")].state == "ready")
    other = house.peer(worker_id="decode-0", role=Role.DECODE)
    other.say(other.hello)
    assert await other.hears() == wire.Welcome()
    other.say(wire.Ready(replace(moving, **changes)))
    refused = await other.hears()
    assert isinstance(refused, wire.Refused) and "prefill-0" in refused.reason and "UCX, fp8" in refused.reason


async def test_progress_is_shown_until_ready(house):
    peer = house.peer()
    peer.say(peer.hello)
    await peer.hears()
    peer.say(wire.Progress("loading weights"))
    await until(lambda: house.pool[WorkerId("agg-0")].phase == "loading weights")
    assert house.pool[WorkerId("agg-0")].state == "starting"


async def test_late_messages_of_a_former_process_do_not_count(house):
    old, client = await house.worker()
    house.pool.gone(client, "was killed")
    assert await old.hears() == wire.Shutdown()
    new, _ = await house.worker(incarnation=2)
    old.say(wire.Heartbeat(77, WorkerLoad(running=77)))
    old.say(wire.Failed("long ago"))
    old.say(step(99, load=WorkerLoad(running=99)))
    new.say(wire.Heartbeat(1, WorkerLoad(running=1)))
    await until(lambda: client.load.running)
    # ZeroMQ keeps no order between peers: what the old one said has arrived when its next hello is answered.
    old.say(msgspec.structs.replace(HELLO, token="none"))
    assert isinstance(await old.hears(), wire.Refused)
    assert (client.load.running, client.steps, client.state) == (1, 1, "ready")


async def test_the_newer_process_takes_the_place(house, running):
    """A worker was started again elsewhere before the first one was missed."""
    old, client = await house.worker()
    run = running(client, a_request())
    assert isinstance(await old.hears(), wire.Submit)
    new = house.peer(incarnation=2)
    new.say(new.hello)
    with pytest.raises(WorkerLost, match="another process took its place"):
        await run
    assert await old.hears() == wire.Shutdown()
    assert await new.hears() == wire.Welcome()
    assert house.listener.heard == [("ready", "agg-0"), ("gone", "agg-0")]


async def test_a_process_that_was_not_ready_yet_is_replaced_too(house):
    old, new = house.peer(), house.peer(incarnation=2)
    old.say(old.hello)
    assert await old.hears() == wire.Welcome()
    new.say(new.hello)
    assert await new.hears() == wire.Welcome()
    assert await old.hears() == wire.Shutdown()
    old.say(wire.Ready(INFO))
    old.say(msgspec.structs.replace(HELLO, token="none"))
    assert isinstance(await old.hears(), wire.Refused)
    assert house.listener.heard == []


async def test_a_worker_that_says_it_failed_is_gone(house, running):
    peer, client = await house.worker()
    run = running(client, a_request())
    assert isinstance(await peer.hears(), wire.Submit)
    peer.say(wire.Failed("out of memory"))
    with pytest.raises(WorkerLost, match="worker agg-0 was lost: out of memory"):
        await run
    assert house.listener.heard == [("ready", "agg-0"), ("gone", "agg-0")]
    assert (client.state, client.phase, client.num_running) == ("gone", "out of memory", 0)


async def test_gone_twice_is_heard_once(house):
    _, client = await house.worker()
    house.pool.gone(client, "first")
    house.pool.gone(client, "second")
    assert house.listener.heard == [("ready", "agg-0"), ("gone", "agg-0")]


@pytest.mark.parametrize(
    "bad",
    [
        wire.Step(1, b"\1" * 8, b"", b"\0" * 3, (), WorkerLoad(), 0, (), None),
        wire.Step(1, b"\1" * 7, b"", b"\0" * 4, (), WorkerLoad(), 0, (), None),
        wire.Step(1, b"\1" * 16, b"", b"\0" * 4, (), WorkerLoad(), 0, (), None),
        wire.Step(1, b"\1" * 8, b"\1\0\1\0", b"\0" * 4, (), WorkerLoad(), 0, (), None),
        wire.Step(1, b"", b"", b"", (wire.Detail(RequestId(1), "bored"),), WorkerLoad(), 0, (), None),
    ],
    ids=["half a token", "half an id", "fewer tokens", "more counts", "finish reason"],
)
async def test_a_step_that_makes_no_sense_ends_its_worker_only(house, bad, running):
    peer, client = await house.worker()
    run = running(client, a_request())
    await peer.hears()
    peer.say(bad)
    with pytest.raises(WorkerLost, match="makes no sense"):
        await run
    other, well = await house.worker(worker_id="agg-1")
    sink = Sink()
    answer = running(well, a_request(2), sink)
    await other.hears()
    other.say(step(1, Output(RequestId(2), [5], FinishReason.LENGTH)))
    assert (await answer).reason == FinishReason.LENGTH
    assert sink.tokens == [5]
