"""Attention-DP ranks of one worker, as the router is told of them."""

from array import array

import pytest

from trtserve.plugins.api import (
    EngineInfo,
    FinishReason,
    KVStored,
    Output,
    PassStats,
    Request,
    RequestId,
    Role,
    SamplingParams,
    StepOutputs,
    StoredBlock,
    WorkerId,
    WorkerLoad,
)
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.metrics import Metrics
from trtserve.server.reports import WorkerReports
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.router import QueueLimits, Router
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient
from trtserve.server.workers.ranks import split
from trtserve.server.workers.wire_sink import Outbox, WireSink

SIZE = 4
INFO = EngineInfo(SIZE, 100, 8, 64, 4096, 1000, num_ranks=2)
PROMPT = array("i", range(40))


class Quiet:
    def see(self, step): ...


@pytest.fixture
async def house():
    core = RoutingCore(PluginManager().make_policy("kv", PolicyConfig()), resync=lambda worker_id: None)
    router = Router(core, QueueLimits(10, 10_000), Metrics())
    reports = WorkerReports(router, lambda: None, lambda client: None)
    client = WorkerClient(WorkerId("agg-0"), Role.AGG, reports)
    sent = []
    client.connected(lambda message: sent.append(message) or True, 1)
    reports.worker_connected(client)
    outbox = Outbox()
    sink = WireSink(outbox, Quiet())

    def say(step):
        """As the worker does, and the server hears it."""
        sink.push(step)
        for message in wire.decode_from_worker(outbox.take()):
            client.on_step(message)
            client.account(message)

    return router, reports, client, sink, say


def stored(rank):
    chain = block_hashes(PROMPT, SIZE)
    blocks = tuple(StoredBlock(h, PROMPT[i * SIZE : (i + 1) * SIZE]) for i, h in enumerate(chain))
    return StepOutputs((), WorkerLoad(free_blocks=50 + rank), [KVStored(None, blocks)], rank=rank)


async def test_each_rank_is_a_worker_to_the_router(house):
    router, reports, client, sink, say = house
    say(stored(1))  # before it is ready, as in the warm-up
    say(StepOutputs((), WorkerLoad(), stats=PassStats(0.01, 8, 0, 0)))
    client.ready(INFO)
    reports.worker_ready(client)
    assert set(router.core.workers) == {"agg-0/0", "agg-0/1"}
    assert [router.core.indexed(WorkerId(f"agg-0/{rank}"))[0] for rank in (0, 1)] == [0, 10]
    request = Request(RequestId(1), PROMPT, SamplingParams(4), block_hashes=block_hashes(PROMPT, SIZE))
    with await router.place(request, Role.AGG) as placement:
        assert placement.worker_id == "agg-0/1" and split(placement.worker_id) == ("agg-0", 1)
        say(StepOutputs((Output(RequestId(1), [7], FinishReason.LENGTH, cached_tokens=36),), WorkerLoad(), rank=1))
        assert router.booked(WorkerId("agg-0/1"))[0] == 1 and router.booked(WorkerId("agg-0/0"))[0] == 0
    assert client.load == sink.load == WorkerLoad()
    reports.worker_gone(client)
    assert not router.core.workers


async def test_events_of_ranks_are_counted_apart_and_told_again_apart(house):
    router, reports, client, sink, say = house
    client.ready(INFO)
    reports.worker_ready(client)
    say(stored(0))
    say(stored(1))
    assert [router.core.indexed(WorkerId(f"agg-0/{rank}")) for rank in (0, 1)] == [(10, 0), (10, 0)]
    assert client.load.free_blocks == sink.load.free_blocks == 101
    sink.push_blocks()
    for rank, answer in zip((0, 1), wire.decode_from_worker(sink._outbox.take()), strict=True):
        assert (answer.rank, answer.next_event, len(answer.hashes)) == (rank, 1, 80)
        client.on_blocks(answer)
    with pytest.raises(ValueError, match="rank 2, of 2"):
        say(stored(2))
