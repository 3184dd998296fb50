"""A first hand-over between workers whose engines move KV, before they get requests; clients are played."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from trtserve.plugins.api import EngineInfo, Finish, FinishReason, KVHandle, Role, WorkerId
from trtserve.server.errors import WorkerLost
from trtserve.server.pair_warm_up import PairWarmUp
from trtserve.server.workers.client import WorkerState

HANDLE = KVHandle(3, WorkerId("p"), 1, 0, (), descriptor=b"x")


class Client:
    """`ends`: what its next runs end with."""

    def __init__(self, worker_id, role, num_ranks=1, moves_kv=True):
        self.worker_id, self.role, self.num_ranks, self.moves_kv = WorkerId(worker_id), role, num_ranks, moves_kv
        self.state, self.is_warming = WorkerState.READY, False
        self.info = EngineInfo(16, 64, 8, 512, 100, 1000, moves_kv=moves_kv, num_ranks=num_ranks)
        self.ends, self.requests, self.was_warming, self.let_go, self.is_stuck = [], [], [], [], False
        self.stuck = asyncio.Event()
        self._failed = asyncio.get_running_loop().create_future()

    async def run(self, request, sink, keep_kv=False):
        self.requests.append(request)
        self.was_warming.append(self.is_warming)
        if self.is_stuck:
            self.stuck.set()
            await self._failed
        end = self.ends.pop(0) if self.ends else Finish(FinishReason.LENGTH, kv_handle=HANDLE if keep_kv else None)
        if isinstance(end, Exception):
            raise end
        sink.push([500], None)
        return end

    def fail(self, error):
        """End a stuck run; the next one is not stuck."""
        self.is_stuck = False
        self._failed.set_exception(error)

    def let_go_of_kv(self, request_id):
        self.let_go.append(request_id)


class House:
    def __init__(self, *clients, limit_s=5.0):
        self.clients, self.drained, self.counted = clients, set(), []
        self.changed = asyncio.Event()
        drains = SimpleNamespace(drain=self._drain, count=self.counted.append)
        self.pairs = PairWarmUp(lambda: self.clients, drains, self.changed.set, limit_s)

    def _drain(self, client, is_draining):
        (self.drained.add if is_draining else self.drained.discard)(client)

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.pairs.run())
        try:
            yield
        finally:
            task.cancel()

    async def warmed(self, client):
        self.pairs.begin(client)
        assert client.is_warming and client in self.drained
        async with self.running(), asyncio.timeout(5):
            while client.is_warming:
                self.changed.clear()
                await self.changed.wait()
        assert not self.drained


async def test_a_pair_hands_over_before_either_takes_requests():
    prefill, decode = Client("p", Role.PREFILL), Client("d", Role.DECODE)
    decode.state = WorkerState.STARTING
    house = House(prefill, decode)
    await house.warmed(prefill)
    assert prefill.requests == []  # nobody to hand over to
    decode.state = WorkerState.READY
    await house.warmed(decode)
    (first,), (rest,) = prefill.requests, decode.requests
    assert rest.kv_handle == HANDLE and rest.num_resumed == 1 and rest.prompt[:-1] == first.prompt
    assert prefill.let_go == [first.id] and not house.counted


async def test_each_rank_is_tried():
    prefill, decode = Client("p", Role.PREFILL, num_ranks=2), Client("d", Role.DECODE, num_ranks=4)
    await House(prefill, decode).warmed(decode)
    assert [request.rank for request in prefill.requests] == [0, 1, 0, 1]
    assert [request.rank for request in decode.requests] == [0, 1, 2, 3]
    assert len(prefill.let_go) == 4


@pytest.mark.parametrize(
    "end", [Finish(FinishReason.ERROR, error="not there", kv_lost=True), WorkerLost("gone"), Finish(FinishReason.STOP)]
)
async def test_a_pair_that_fails_is_told_and_serves_all_the_same(end, caplog):
    prefill, decode = Client("p", Role.PREFILL), Client("d", Role.DECODE)
    decode.ends = [end]
    house = House(prefill, decode)
    await house.warmed(decode)
    assert house.counted == ["pair_failed"] and len(prefill.let_go) == 1
    assert "no KV could be handed over from p to d" in caplog.text


async def test_a_pair_that_hangs_is_given_up(caplog):
    prefill, decode = Client("p", Role.PREFILL), Client("d", Role.DECODE)
    decode.is_stuck = True
    house = House(prefill, decode, limit_s=0.05)
    await house.warmed(decode)
    assert house.counted == ["pair_failed"] and "longer than 0 s" in caplog.text


async def test_a_process_that_replaced_one_being_warmed_has_its_own_turn():
    prefill, decode = Client("p", Role.PREFILL), Client("d", Role.DECODE)
    house = House(prefill, decode)
    house.pairs.begin(decode)
    decode.is_stuck = True
    async with house.running(), asyncio.timeout(5):
        await decode.stuck.wait()
        house.pairs.begin(decode)  # another process of it is ready
        decode.fail(WorkerLost("gone"))
        await house.changed.wait()
    assert decode.was_warming == [True, True], "it takes no requests before it has tried its pairs"
    assert not decode.is_warming and not house.drained and house.counted == ["pair_failed"]


async def test_engines_that_move_no_kv_take_requests_at_once():
    for client in (Client("p", Role.PREFILL, moves_kv=False), Client("a", Role.AGG)):
        house = House(client)
        house.pairs.begin(client)
        assert not client.is_warming and not house.drained
