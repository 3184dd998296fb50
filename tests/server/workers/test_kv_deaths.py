"""Two worker processes, of which one is killed or stopped before, during or after a read: the other one goes on."""

import asyncio
import signal
from contextlib import suppress

import pytest

from tests.server.workers.kv_sites import (
    ProcessSite,
    a_prompt,
    connected,
    decoded,
    handed_over,
    nothing_is_left,
    prefilled,
    resumed,
    usage_of,
)
from trtserve.server.errors import WorkerLost

NUM_TOKENS = 60 * 8
BLOCK_BYTES = 1 << 20  # so that a read of 60 takes a while


@pytest.fixture
async def pair(sites):
    return await sites.pair(ProcessSite, kv_block_bytes=BLOCK_BYTES)


@pytest.fixture
def process_of(sites):
    """The process of the worker that was started first or second."""
    return lambda place: sites.started[place].process


async def fetched_around(prefill, decode, request, handle, when, strike):
    """Strike before, during or after the read; what the worker reports of it."""
    if when == "before":
        strike()
    decode.kv.fetch(request, handle)
    if when == "during":
        strike()
    fetched = await decode.kv.fetched(request.id, 10)
    if when == "after":
        strike()
    return fetched


@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_the_prefill_worker_is_killed(sites, pair, process_of, when):
    prefill, decode = pair
    request = a_prompt(1, NUM_TOKENS)
    tokens, handle = await prefilled(prefill, request)

    def kill():
        process_of(0).kill()
        sites.house.pool.gone(prefill, "killed")  # as the supervisor says when the process has ended

    fetched = await fetched_around(prefill, decode, request, handle, when, kill)
    if when == "before":
        assert not fetched.ok and "is not there" in fetched.reason
    assert fetched.ok or fetched.reason
    with pytest.raises(WorkerLost):
        await prefill.kv.release(handle.lease_id, 5)
    decode.kv.commit(request.id, False)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(decode)
    await connected(decode, 0)
    _, again = await sites.start("prefill-0", ProcessSite, kv_block_bytes=BLOCK_BYTES)
    await connected(decode)
    assert await handed_over(again, decode, a_prompt(2, NUM_TOKENS)) == NUM_TOKENS
    await nothing_is_left(again, decode)


async def test_the_server_does_not_know_yet_that_the_prefill_worker_died(pair, process_of):
    prefill, decode = pair
    request = a_prompt(1, NUM_TOKENS)
    tokens, handle = await prefilled(prefill, request)
    process_of(0).kill()
    process_of(0).wait()
    decode.kv.fetch(request, handle)
    await decode.kv.fetched(request.id, 10)  # either way: shared memory outlives its owner
    with suppress(WorkerLost):  # known as soon as the connection is seen to be broken
        assert not await prefill.kv.release(handle.lease_id, 0.2)
    decode.kv.commit(request.id, False)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(decode)


@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_the_prefill_worker_is_stopped_and_goes_on_later(pair, process_of, when):
    prefill, decode = pair
    request = a_prompt(1, NUM_TOKENS)
    tokens, handle = await prefilled(prefill, request)
    process = process_of(0)
    fetched = await fetched_around(prefill, decode, request, handle, when, lambda: process.send_signal(signal.SIGSTOP))
    assert fetched.ok, fetched  # the owner of shared memory takes no part in a read
    assert not await prefill.kv.release(handle.lease_id, 0.2)
    decode.kv.commit(request.id, False)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    process.send_signal(signal.SIGCONT)
    await nothing_is_left(prefill, decode)
    assert await handed_over(prefill, decode, a_prompt(2, NUM_TOKENS)) == NUM_TOKENS


@pytest.mark.parametrize("is_killed", [True, False])
async def test_the_decode_worker_ends_during_its_read(sites, pair, process_of, is_killed):
    prefill, decode = pair
    request = a_prompt(1, NUM_TOKENS)
    _, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    waiting = asyncio.create_task(decode.kv.fetched(request.id, 0.2))
    process_of(1).send_signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    if is_killed:
        await asyncio.sleep(0)
        sites.house.pool.gone(decode, "killed")
    with pytest.raises(WorkerLost if is_killed else TimeoutError):
        await waiting
    prefill.kv.drop(handle.lease_id)
    await nothing_is_left(prefill)
    if not is_killed:
        decode.kv.abort(request.id)
        process_of(1).send_signal(signal.SIGCONT)
        await nothing_is_left(decode)
        assert await handed_over(prefill, decode, a_prompt(2, NUM_TOKENS)) == NUM_TOKENS


async def test_a_peer_that_is_stopped_as_it_joins_is_connected_later(sites):
    _, decode = await sites.start("decode-0")
    site, prefill = await sites.start("prefill-0", ProcessSite)
    await connected(decode)
    site.process.send_signal(signal.SIGSTOP)
    later, other = await sites.start("decode-1", ProcessSite)
    del later
    site.process.send_signal(signal.SIGCONT)
    await usage_of(other, lambda usage: usage.peers == 1)
    assert await handed_over(prefill, other, a_prompt(1)) == 200
