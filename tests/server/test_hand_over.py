"""One request's KV between two workers, as the server conducts it, against clients that are played."""

import asyncio
from array import array
from types import SimpleNamespace

import pytest

from trtserve.plugins.api import Finish, FinishReason, KVHandle, Request, RequestId, SamplingParams, WorkerId
from trtserve.server.errors import WorkerLost
from trtserve.server.hand_over import ServerHandOver
from trtserve.server.workers.kv_messages import KVFetched

REQUEST = Request(RequestId(1), array("i", range(40)), SamplingParams(5))


class PlayedKV:
    """Both sides of a worker's hand-over; `said` is what it was told."""

    def __init__(self):
        self.said = []
        self.fetch_ok, self.lease_holds, self.is_lost = True, True, False

    def fetch(self, request, handle):
        if self.is_lost:
            raise WorkerLost("gone")
        self.said.append(("fetch", handle.first_block))

    async def fetched(self, request_id, deadline_s):
        return KVFetched(request_id, self.fetch_ok, 2, 100, 0.1, "memfd", "")

    def commit(self, request_id, is_valid):
        self.said.append(("commit", is_valid))

    def abort(self, request_id):
        self.said.append(("abort",))

    async def release(self, lease_id, deadline_s):
        self.said.append(("release", lease_id))
        if self.is_lost:
            raise WorkerLost("gone")
        return self.lease_holds

    def drop(self, lease_id):
        self.said.append(("drop", lease_id))


class Listener:
    def __init__(self):
        self.clients = {
            name: SimpleNamespace(worker_id=WorkerId(name), kv=PlayedKV(), moves_kv=False)
            for name in ("p", "q", "d", "e")
        }
        self.live, self.outcomes = set(), []

    def hand_over_began(self, hand_over):
        self.live.add(hand_over)

    def hand_over_ended(self, hand_over):
        self.live.remove(hand_over)

    def fetched(self, fetch, is_valid, waited_s):
        self.outcomes.append(is_valid)

    def client(self, worker_id):
        return self.clients[worker_id]


@pytest.fixture
def listener():
    return Listener()


def handle(first=0, rows=(4, 5), final=True, lease=7, worker="p"):
    return KVHandle(lease, WorkerId(worker), 1, first, tuple(rows), final)


def at(name):
    return SimpleNamespace(worker_id=WorkerId(name))


async def test_what_was_read_counts_only_if_the_lease_held(listener):
    for holds in (True, False):
        prefill, decode = listener.clients["p"].kv, listener.clients["d"].kv
        prefill.lease_holds, prefill.said, decode.said = holds, [], []
        async with ServerHandOver(REQUEST, listener) as kv:
            kv.expect(listener.clients["p"])
            kv.on_kv(handle())
            kv.begin(at("d"))
            assert await kv.complete() is holds
        assert decode.said == [("fetch", 0), ("commit", holds)] and prefill.said == [("release", 7)]
    assert listener.outcomes == [True, False] and not listener.live


async def test_parts_are_read_as_they_come(listener):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle(0, (1,), final=False))
        await kv.published()
        kv.begin(at("d"))
        kv.on_kv(handle(1, (2,)))
        assert await kv.complete()
    assert listener.clients["d"].kv.said == [("fetch", 0), ("fetch", 1), ("commit", True)]


async def test_a_prompt_without_a_full_block_needs_no_transfer(listener):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle(rows=(), lease=0))
        kv.begin(at("d"))
        assert await kv.complete()
    assert listener.clients["d"].kv.said == listener.clients["p"].kv.said == []


async def test_a_prefill_worker_lost_on_the_way_is_not_waited_for(listener):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle(0, (1,), final=False))
        kv.begin(at("d"))
        async with asyncio.timeout(1):
            assert not await kv.complete()
    assert listener.clients["d"].kv.said == [("fetch", 0), ("abort",)]
    assert listener.clients["p"].kv.said == [("drop", 7)]


async def test_a_second_prefill_worker_replaces_the_first(listener):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle(0, (1,), final=False))
        kv.begin(at("d"))
        kv.expect(listener.clients["q"])
        kv.on_kv(handle(lease=9, worker="q"))
        kv.begin(at("d"))
        assert await kv.complete()
    assert listener.clients["p"].kv.said == [("drop", 7)] and listener.clients["q"].kv.said == [("release", 9)]
    assert listener.clients["d"].kv.said == [("fetch", 0), ("abort",), ("fetch", 0), ("commit", True)]


async def test_a_lost_source_makes_what_was_read_worthless(listener):
    listener.clients["p"].kv.is_lost = True
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle())
        kv.begin(at("d"))
        assert not await kv.complete()
    assert listener.clients["d"].kv.said[-1] == ("commit", False)


async def test_a_failed_fetch_gives_the_lease_back(listener):
    listener.clients["d"].kv.fetch_ok = False
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle())
        kv.begin(at("d"))
        assert not await kv.complete()
        kv.begin(at("e"))  # the lease is over: another worker has nothing to read
        assert not await kv.complete()
    assert listener.clients["p"].kv.said == [("release", 7)] and listener.clients["e"].kv.said == []


async def test_leaving_at_any_time_gives_everything_back(listener):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(listener.clients["p"])
        kv.on_kv(handle())
        kv.begin(at("d"))
    assert listener.clients["d"].kv.said == [("fetch", 0), ("abort",)]
    assert listener.clients["p"].kv.said == [("drop", 7)] and not listener.live


# ------------------------------------------------------------------ engines that move KV themselves


@pytest.fixture
def mover(listener):
    """A prefill worker whose engine does; `let_go` are the requests whose KV it was told is not needed."""
    client = listener.clients["p"]
    client.moves_kv, client.let_go, client.is_there = True, [], True
    client.let_go_of_kv = client.let_go.append
    client.keeps = lambda handle: client.is_there
    return client


async def test_a_kept_handle_is_given_once_and_let_go_at_the_end(listener, mover):
    kept = KVHandle(9, WorkerId("p"), 1, 0, (), descriptor=b"x")
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(mover)
        assert kv.uses(mover)
        kv.prefilled(Finish(FinishReason.LENGTH, kv_handle=kept))
        kv.begin(at("d"))
        assert await kv.complete()
        assert kv.give(REQUEST).kv_handle == kept and kv.give(REQUEST).kv_handle is None
        assert mover.let_go == []
    assert mover.let_go == [REQUEST.id] and not kv.uses(mover)
    assert listener.clients["d"].kv.said == mover.kv.said == []


async def test_of_a_prefill_that_kept_nothing_nothing_is_given(listener, mover):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(mover)
        kv.prefilled(Finish(FinishReason.STOP))
    assert mover.let_go == []


async def test_what_a_dead_process_kept_is_not_given(listener, mover):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(mover)
        kv.prefilled(Finish(FinishReason.LENGTH, kv_handle=KVHandle(9, WorkerId("p"), 1, 0, ())))
        mover.is_there = False
        assert not await kv.complete()
        assert kv.give(REQUEST).kv_handle is None


async def test_a_prefill_that_is_tried_again_lets_the_first_one_go(listener, mover):
    async with ServerHandOver(REQUEST, listener) as kv:
        kv.expect(mover)
        kv.expect(listener.clients["q"])
        assert mover.let_go == [REQUEST.id] and not kv.uses(mover)
