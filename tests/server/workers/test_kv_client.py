"""The server's side of the hand-over, against peers that say what a test tells them."""

import asyncio

import pytest

from tests.server.workers.conftest import INFO, Sink, a_request, until
from trtserve.plugins.api import KVHandle, RequestId, WorkerId, WorkerLoad
from trtserve.plugins.transfer_api import PeerInfo
from trtserve.server.errors import WorkerLost
from trtserve.server.workers import kv_messages as kv
from trtserve.server.workers import wire

OWN = PeerInfo(WorkerId("agg-0"), 1, "boot", "ns", 0, 1, "127.0.0.1")
PORT = kv.KVPort("layout", 1024, 100, OWN, (("shm", b"export"),))
HANDLE = KVHandle(7, WorkerId("prefill-0"), 3, 0, (1, 2))


@pytest.fixture
async def worker(house):
    """A peer that takes part, and its client."""
    peer = house.peer()
    peer.say(peer.hello)
    assert await peer.hears() == wire.Welcome()
    peer.say(wire.Ready(INFO, PORT))
    await until(lambda: any(client.state == "ready" for client in house.pool))
    return peer, house.pool[WorkerId("agg-0")]


def ended(number):
    """A step in which a request gets its last token."""
    ids, tokens = (number.to_bytes(8, "little"), b"\1\0\0\0")
    detail = wire.Detail(RequestId(number), "length", 0)
    return wire.Step(1, ids, b"", tokens, (detail,), WorkerLoad(), 0, (), None)


async def kept(worker, on_kv=None):
    """A run with keep_kv that the worker has heard of."""
    peer, client = worker
    run = asyncio.create_task(client.run(a_request(1), Sink(), keep_kv=True, on_kv=on_kv))
    submitted = await peer.hears()
    assert submitted.keep_kv
    return run


def published(first_block, rows, is_final, lease_id=7):
    return kv.KVPublished(RequestId(1), lease_id, first_block, kv.pack_rows(rows), is_final)


async def test_the_parts_are_one_handle_in_the_end(worker):
    peer, _ = worker
    parts = []
    run = await kept(worker, parts.append)
    peer.say(published(0, [5, 6], False))
    peer.say(ended(1))
    peer.say(published(2, [9], True))
    handle = (await run).kv_handle
    assert handle == KVHandle(7, WorkerId("agg-0"), 1, 0, (5, 6, 9))
    assert [(part.first_block, part.rows, part.is_final) for part in parts] == [(0, (5, 6), False), (2, (9,), True)]


async def test_the_worker_s_word_comes_before_its_last_step(worker):
    peer, _ = worker
    run = await kept(worker)
    peer.say(published(0, [5], True))
    peer.say(ended(1))
    assert (await run).kv_handle.rows == (5,)


async def test_a_lease_that_nobody_waits_for_is_given_back(worker):
    peer, _ = worker
    run = await kept(worker)
    run.cancel()
    assert await peer.hears() == wire.Cancel(RequestId(1))
    peer.say(published(0, [5], True))
    assert await peer.hears() == kv.KVRelease(7)


async def test_a_lease_is_given_back_where_the_run_ended_otherwise(worker):
    peer, client = worker
    run = await kept(worker)
    peer.say(published(0, [5], True))
    await until(lambda: not client.kv._publications)
    client.stop(RequestId(1))
    assert (await run).kv_handle is None
    assert {type(await peer.hears()) for _ in range(2)} == {wire.Cancel, kv.KVRelease}


@pytest.mark.parametrize(
    "nonsense",
    [
        published(1, [5], False),
        published(0, [100], False),
        published(0, [-1], False),
        kv.KVPublished(RequestId(1), 7, 0, b"123", True),
    ],
)
async def test_a_publication_without_sense_ends_the_worker(worker, nonsense):
    peer, client = worker
    run = await kept(worker)
    peer.say(nonsense)
    with pytest.raises(WorkerLost, match="makes no sense"):
        await run
    assert client.kv.port is None


async def test_everything_that_waits_fails_when_the_worker_goes(house, worker):
    peer, client = worker
    run = await kept(worker)
    peer.say(ended(1))
    client.kv.fetch(a_request(2), HANDLE)
    waiting = [run, *map(asyncio.create_task, (client.kv.release(7, 10), client.kv.fetched(RequestId(2), 10)))]
    await until(lambda: client.kv._releases)
    house.pool.gone(client, "it ended")
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [WorkerLost] * 3
    with pytest.raises(WorkerLost):
        await client.kv.release(7, 10)
    with pytest.raises(WorkerLost):
        client.kv.fetch(a_request(3), HANDLE)
    client.kv.commit(RequestId(2), True)
    client.kv.abort(RequestId(2))
    client.kv.extend([1])
    client.kv.drop(1)


async def test_a_worker_lost_before_anybody_waits_for_its_fetch_is_lost(house, worker):
    """A request whose prompt is still being computed begins to wait later."""
    _, client = worker
    client.kv.fetch(a_request(2), HANDLE)
    house.pool.gone(client, "it ended")
    with pytest.raises(WorkerLost, match="lost meanwhile"):
        await client.kv.fetched(RequestId(2), 10)


async def test_a_release_waits_no_longer_than_it_may(worker):
    peer, client = worker
    assert not await client.kv.release(7, 0.01)
    again = asyncio.create_task(client.kv.release(7, 10))
    assert await peer.hears() == kv.KVRelease(7)
    peer.say(kv.KVReleased(7, True))
    peer.say(kv.KVReleased(7, True))
    assert await again


async def test_a_fetch_s_messages_come_in_order(worker):
    peer, client = worker
    request = a_request(2)
    client.kv.fetch(request, KVHandle(7, WorkerId("prefill-0"), 3, 0, (1,), is_final=False))
    client.kv.fetch(request, KVHandle(7, WorkerId("prefill-0"), 3, 1, (2,)))
    with pytest.raises(TimeoutError):
        await client.kv.fetched(request.id, 0.01)
    client.kv.commit(request.id, True)
    client.kv.abort(request.id)  # too late
    first, second, commit = [await peer.hears() for _ in range(3)]
    assert (first.prompt, second.prompt) == (request.prompt.tobytes(), b"")
    assert (first.is_final, second.is_final) == (False, True)
    assert commit == kv.KVCommit(request.id, True)
    with pytest.raises(WorkerLost):
        await client.kv.fetched(request.id, 1)


async def test_who_waits_for_an_aborted_fetch_is_told(worker):
    _, client = worker
    client.kv.fetch(a_request(2), HANDLE)
    waiting = asyncio.create_task(client.kv.fetched(RequestId(2), 10))
    await asyncio.sleep(0)
    client.kv.abort(RequestId(2))
    assert not (await waiting).ok


async def test_many_leases_are_extended_in_several_messages(worker):
    peer, client = worker
    client.kv.extend(range(kv.MAX_LEASES + 1))
    first, second = await peer.hears(), await peer.hears()
    assert first.lease_ids + second.lease_ids == tuple(range(kv.MAX_LEASES + 1))


async def test_a_heartbeat_s_usage_is_kept(worker):
    peer, client = worker
    peer.say(wire.Heartbeat(0, WorkerLoad(), kv.KVUsage(rows_free=5)))
    await until(lambda: client.kv.usage.rows_free == 5)
