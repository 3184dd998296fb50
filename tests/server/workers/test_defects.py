"""A defect of the server itself, met while a worker's message is handled: it is logged, and hits whom it belongs to."""

import pytest

from tests.server.workers.conftest import INFO, Sink, a_request, until
from trtserve.plugins.api import FinishReason, Output, RequestId, StepOutputs, WorkerLoad
from trtserve.server.errors import Internal, WorkerLost
from trtserve.server.workers import wire


class Broken:
    """A sink that breaks in one of its methods."""

    def __init__(self, method):
        self._method = method

    def push(self, token_ids, logprobs):
        self._call("push")

    def cached(self, num_tokens):
        self._call("cached")

    def _call(self, method):
        if method == self._method:
            raise TypeError("a defect of this sink")


def step(number, *outputs):
    return wire.step_of(number, 0, StepOutputs(outputs, WorkerLoad()))


def together(peer, *messages):
    """Read in one turn of the server's loop."""
    peer.say_bytes(wire.batch_of([wire.encode(message) for message in messages]))


def outputs(*numbers, tokens=(7,), finish=None):
    return [Output(RequestId(number), list(tokens), finish, cached_tokens=1) for number in numbers]


@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("push", step(1, Output(RequestId(1), [7]), Output(RequestId(2), [7]))),  # the shortest way
        ("push", step(1, *outputs(1, 2, tokens=[7, 8]))),
        ("cached", step(1, *outputs(1, 2))),
    ],
    ids=["plain push", "push", "cached"],
)
async def test_a_sink_that_breaks_fails_its_own_request(house, running, caplog, method, first):
    peer, client = await house.worker()
    sink = Sink()
    broken, well = running(client, a_request(1), Broken(method)), running(client, a_request(2), sink)
    await peer.hears(), await peer.hears()
    together(peer, first, step(2, Output(RequestId(2), [9], FinishReason.LENGTH)))
    with pytest.raises(Internal):
        await broken
    assert (await well).reason is FinishReason.LENGTH
    assert sink.tokens[0] == 7 and sink.tokens[-1] == 9
    assert await peer.hears() == wire.Cancel(RequestId(1))
    assert client.state == "ready" and "a defect of this sink" in caplog.text
    peer.say(step(3, Output(RequestId(1), (), FinishReason.CANCELLED)))
    await until(lambda: client.num_running == 0)


async def test_the_router_s_defect_costs_no_request_and_no_worker(house, running, caplog, monkeypatch):
    peer, client = await house.worker()
    sink = Sink()
    run = running(client, a_request(1), sink)
    await peer.hears()
    heard = []

    def on_step(client, step):
        heard.append(step.number)
        raise KeyError("a defect of the router")

    monkeypatch.setattr(house.listener, "on_step", on_step)
    together(peer, step(1, *outputs(1)), step(2, *outputs(1)), step(3, *outputs(1, finish=FinishReason.LENGTH)))
    await run
    assert sink.tokens == [7, 7, 7]
    await until(lambda: heard == [1, 2, 3])
    assert client.state == "ready" and "a defect of the router" in caplog.text


async def test_a_message_that_cannot_be_handled_costs_its_worker_and_not_what_comes_behind_it(
    house, running, caplog, monkeypatch
):
    well, well_client = await house.worker(worker_id="well")
    run = running(well_client, a_request(1))
    await well.hears()
    peer, client = await house.worker()
    lost = running(client, a_request(2))
    await peer.hears()

    def on_heartbeat(message):
        raise KeyError("a defect of the client")

    monkeypatch.setattr(client, "on_heartbeat", on_heartbeat)
    together(peer, wire.Heartbeat(1, WorkerLoad()), wire.Progress("the next one"))
    with pytest.raises(WorkerLost, match="heartbeat"):
        await lost
    assert await peer.hears() == wire.Shutdown()
    assert "a defect of the client" in caplog.text
    well.say(step(1, *outputs(1, finish=FinishReason.LENGTH)))
    await run


@pytest.mark.parametrize("event", ["worker_connected", "worker_ready"])
async def test_a_worker_that_cannot_be_taken_is_given_up(house, monkeypatch, event):
    def fail(client):
        raise KeyError("a defect of the router")

    monkeypatch.setattr(house.listener, event, fail)
    peer = house.peer()
    peer.say(peer.hello)
    if event == "worker_ready":
        assert await peer.hears() == wire.Welcome()
        peer.say(wire.Ready(INFO))
    assert await peer.hears() == wire.Shutdown()
    assert house.pool["agg-0"].state == "gone" and "defect" in house.pool["agg-0"].phase
    monkeypatch.undo()
    await house.worker(incarnation=2)


async def test_whatever_breaks_the_rest_of_a_turn_is_read(house, monkeypatch, caplog):
    """Beyond all nets of the pool: even giving the worker up fails."""
    peer, client = await house.worker()
    other = house.peer(worker_id="other")

    def on_message(identity, message):
        if isinstance(message, wire.Progress):
            raise KeyError("a defect of the pool")
        house.pool.on_message(identity, message)

    monkeypatch.setattr(house.link, "_on_message", on_message)
    together(peer, wire.Progress("first"), wire.Heartbeat(3, WorkerLoad()), wire.Progress("last"))
    await until(lambda: client.steps == 3)
    await other.joins()
    await until(lambda: house.pool["other"].state == "ready")
    assert caplog.text.count("KeyError: 'a defect of the pool'") == 2
