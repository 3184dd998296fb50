"""KV goes from worker to worker, over real sockets and real shared memory. The simulated engine takes no wrong byte."""

import asyncio

import pytest
from msgspec.structs import replace

from tests.server.workers.conftest import Sink, until
from tests.server.workers.kv_sites import (
    a_prompt,
    connected,
    decoded,
    handed_over,
    nothing_is_left,
    prefilled,
    resumed,
    usage_of,
)
from tests.server.workers.kv_worker import BLOCK_SIZE
from trtserve.plugins.api import FinishReason, WorkerId
from trtserve.server.errors import WorkerLost


async def test_the_decode_worker_computes_the_rest_only(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1, num_tokens=203)
    assert await handed_over(prefill, decode, request) == 200
    usage = await usage_of(decode, lambda usage: usage.blocks_written_total == 25)
    assert (usage.reads_failed_total, usage.writes_failed_total) == (0, 0)
    assert usage.bytes_read_total == 25 * BLOCK_SIZE * 1024
    await nothing_is_left(prefill, decode)
    assert prefill.kv.usage.leases_released_total == 1


async def test_tokens_are_those_of_one_worker(sites):
    prefill, decode = await sites.pair()
    whole = Sink()
    await prefill.run(a_prompt(1, max_tokens=5), whole)
    request = a_prompt(2)
    request = type(request)(request.id, a_prompt(1).prompt, request.sampling)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    await decode.kv.fetched(request.id, 10)
    decode.kv.commit(request.id, await prefill.kv.release(handle.lease_id, 5))
    rest = await decoded(decode, resumed(request, tokens))
    assert tokens + rest.tokens == whole.tokens


async def test_a_long_prompt_is_published_and_read_as_it_grows(sites):
    prefill, decode = await sites.pair(max_num_tokens=64)
    request, parts = a_prompt(1, num_tokens=400), []

    def on_kv(handle):
        parts.append(handle)
        decode.kv.fetch(request, handle)

    sink = Sink()
    finish = await prefill.run(request, sink, keep_kv=True, on_kv=on_kv)
    assert [part.is_final for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > 3
    assert [part.first_block for part in parts[1:]] == [part.first_block + len(part.rows) for part in parts[:-1]]
    assert {part.lease_id for part in parts} == {finish.kv_handle.lease_id}
    assert finish.kv_handle.rows == tuple(row for part in parts for row in part.rows)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks, fetched.lane) == (True, 50, "memfd")
    assert await prefill.kv.release(finish.kv_handle.lease_id, 5)
    decode.kv.commit(request.id, True)
    assert (await decoded(decode, resumed(request, sink.tokens))).cached_tokens == 400
    await nothing_is_left(prefill, decode)


async def test_a_short_prompt_has_nothing_to_hand_over(sites):
    prefill, _ = await sites.pair()
    tokens, handle = await prefilled(prefill, a_prompt(1, num_tokens=BLOCK_SIZE - 1))
    assert len(tokens) == 1 and handle is None
    await nothing_is_left(prefill)


async def test_only_blocks_that_are_lacking_are_read(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1, num_tokens=160)
    await decoded(decode, type(request)(request.id, request.prompt[:80], request.sampling))
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks, fetched.num_bytes) == (True, 10, 10 * BLOCK_SIZE * 1024)
    decode.kv.commit(request.id, True)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 160


async def test_what_is_there_already_is_not_read_at_all(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1)
    await decoded(decode, request)
    _, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks, fetched.num_bytes, fetched.lane) == (True, 0, 0, "")
    decode.kv.commit(request.id, True)
    prefill.kv.drop(handle.lease_id)
    await nothing_is_left(prefill, decode)


class Clock:
    """Stands still unless told otherwise."""

    now_s = 1000.0

    def __call__(self):
        return self.now_s


async def test_a_lease_that_ended_makes_what_was_read_worthless(sites):
    clock = Clock()
    _, prefill = await sites.start("prefill-0", clock=clock)
    _, decode = await sites.start("decode-0")
    await connected(decode)
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    assert (await decode.kv.fetched(request.id, 10)).ok
    clock.now_s += 31
    assert not await prefill.kv.release(handle.lease_id, 5)
    decode.kv.commit(request.id, False)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(prefill, decode)
    assert prefill.kv.usage.leases_expired_total == 1


async def test_a_lease_that_is_extended_goes_on(sites):
    clock = Clock()
    _, prefill = await sites.start("prefill-0", clock=clock)
    _, other = await prefilled(prefill, a_prompt(2, num_tokens=80))
    _, handle = await prefilled(prefill, a_prompt(1, num_tokens=80))
    for _ in range(4):
        clock.now_s += 20
        prefill.kv.extend([handle.lease_id, 77])
        await prefill.kv.release(77, 5)  # answered behind the extension
    assert [await prefill.kv.release(each.lease_id, 5) for each in (handle, other)] == [True, False]
    assert not await prefill.kv.release(handle.lease_id, 5)
    await nothing_is_left(prefill)


async def test_without_rows_less_is_published_and_never_with_a_gap(sites):
    prefill, decode = await sites.pair(num_rows=30, max_num_tokens=80)
    _, first = await prefilled(prefill, a_prompt(1, num_tokens=160))
    request = a_prompt(2, num_tokens=160)
    tokens, second = await prefilled(prefill, request)
    assert (len(first.rows), len(second.rows)) == (20, 10)
    assert not set(first.rows) & set(second.rows)
    _, third = await prefilled(prefill, a_prompt(3, num_tokens=160))
    assert third is None
    decode.kv.fetch(request, second)
    assert (await decode.kv.fetched(request.id, 10)).num_blocks == 10
    assert await prefill.kv.release(second.lease_id, 5)
    decode.kv.commit(request.id, True)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 80
    prefill.kv.drop(first.lease_id)
    await nothing_is_left(prefill, decode, num_rows=30)
    assert prefill.kv.usage.blocks_unpublished_total == 10 + 20


async def test_a_decode_worker_without_rows_reads_what_it_can(sites):
    _, prefill = await sites.start("prefill-0")
    _, decode = await sites.start("decode-0", num_rows=7)
    await connected(decode)
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks) == (True, 7) and "no row was free for 18 of 25" in fetched.reason
    decode.kv.commit(request.id, True)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 7 * BLOCK_SIZE
    await nothing_is_left(decode, num_rows=7)


@pytest.mark.parametrize("when", ["at once", "when fetched", "twice"])
async def test_a_fetch_that_is_aborted_leaves_nothing(sites, when):
    prefill, decode = await sites.pair()
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    if when == "when fetched":
        await decode.kv.fetched(request.id, 10)
    decode.kv.abort(request.id)
    if when == "twice":
        decode.kv.fetch(request, handle)
        decode.kv.abort(request.id)
    decode.kv.commit(request.id, True)  # of nothing
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(decode)


async def test_a_request_can_be_fetched_again_from_another_handle(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    decode.kv.abort(request.id)
    _, again = await prefilled(prefill, request)
    decode.kv.fetch(request, again)
    assert (await decode.kv.fetched(request.id, 10)).num_blocks == 25
    decode.kv.commit(request.id, await prefill.kv.release(again.lease_id, 5))
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 200


async def test_a_commit_before_the_end_drops_the_fetch(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, replace(handle, is_final=False))
    decode.kv.commit(request.id, True)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(decode)


async def test_many_at_once(sites):
    """More than there are rows for, with cancels and aborts in between: nothing is wrong and nothing is left."""
    # Room for all of them: what was written is still there when its request comes, however late that is.
    prefill, decode = await sites.pair(max_num_tokens=256, num_rows=200, num_blocks=2000)

    async def one(number):
        request = a_prompt(number, num_tokens=100 + number)
        if number % 5 == 0:
            run = asyncio.create_task(prefill.run(request, Sink(), keep_kv=True))
            await asyncio.sleep(0)
            run.cancel()
            await asyncio.wait({run})
            return 0
        if number % 7 == 0:
            _, handle = await prefilled(prefill, request)
            if handle is not None:
                decode.kv.fetch(request, handle)
                decode.kv.abort(request.id)
                prefill.kv.drop(handle.lease_id)
            return 0
        tokens, handle = await prefilled(prefill, request)
        is_valid = False
        if handle is not None:
            decode.kv.fetch(request, handle)
            fetched = await decode.kv.fetched(request.id, 10)
            assert fetched.ok, fetched
            is_valid = await prefill.kv.release(handle.lease_id, 10)
        decode.kv.commit(request.id, is_valid)
        return (await decoded(decode, resumed(request, tokens))).cached_tokens

    cached = await asyncio.gather(*(one(number) for number in range(1, 61)))
    assert sum(cached) > 500
    await nothing_is_left(prefill, decode, num_rows=200)
    usage = decode.kv.usage
    assert (usage.reads_failed_total, usage.writes_failed_total, usage.rows_quarantined) == (0, 0, 0)
    assert usage.blocks_written_total * BLOCK_SIZE == sum(cached)


async def test_a_run_that_is_cancelled_leaves_no_lease(sites):
    prefill, _ = await sites.pair()
    for number in range(1, 6):
        run = asyncio.create_task(prefill.run(a_prompt(number), Sink(), keep_kv=True))
        for _ in range(number):
            await asyncio.sleep(0)
        run.cancel()
        await asyncio.wait({run})
        if not run.cancelled():  # on a busy machine it was over before: the lease is the caller's then
            prefill.kv.drop(run.result().kv_handle.lease_id)
    await nothing_is_left(prefill)


async def test_a_run_that_ends_otherwise_leaves_no_lease(sites):
    prefill, _ = await sites.pair()
    stopped = a_prompt(1)
    token = (await prefilled(prefill, stopped))[0][0]
    await usage_of(prefill, lambda usage: usage.leases == 1)
    sampling = type(stopped.sampling)(1, temperature=0.0, stop_token_ids=(token,))
    finish = await prefill.run(type(stopped)(stopped.id, stopped.prompt, sampling), Sink(), keep_kv=True)
    assert (finish.reason, finish.kv_handle) == (FinishReason.STOP, None)
    finish = await prefill.run(a_prompt(2, num_tokens=10_000), Sink(), keep_kv=True)
    assert (finish.reason, finish.kv_handle) == (FinishReason.ERROR, None)
    await usage_of(prefill, lambda usage: (usage.leases, usage.leases_granted_total) == (1, 2))


async def test_the_peer_s_next_incarnation_is_another_one(sites):
    prefill, decode = await sites.pair()
    request = a_prompt(1)
    _, old = await prefilled(prefill, request)
    sites.started[0].end()
    await until(lambda: prefill.state == "gone")
    await connected(decode, 0)
    decode.kv.fetch(request, old)
    fetched = await decode.kv.fetched(request.id, 10)
    assert not fetched.ok and "is not there" in fetched.reason
    decode.kv.abort(request.id)
    await sites.start("prefill-0")
    await connected(decode)
    decode.kv.fetch(request, old)
    fetched = await decode.kv.fetched(request.id, 10)
    assert not fetched.ok and "restarted" in fetched.reason
    assert not await prefill.kv.release(old.lease_id, 5)
    decode.kv.commit(request.id, False)
    assert await handed_over(prefill, decode, a_prompt(2)) == 200
    await nothing_is_left(prefill, decode)


async def test_workers_in_any_order_are_introduced(sites):
    _, decode = await sites.start("decode-0")
    clients = [(await sites.start(f"prefill-{number}"))[1] for number in range(2)]
    await connected(decode, 2)
    for number, prefill in enumerate(clients, 1):
        assert await handed_over(prefill, decode, a_prompt(number)) == 200


async def test_another_layout_is_refused(sites):
    await sites.start("prefill-0")
    site = sites.started[0].__class__(sites.house.link.endpoint, sites.folder, "decode-0", 2, kv_block_bytes=4096)
    sites.started.append(site)
    await until(lambda: WorkerId("decode-0") in {client.worker_id for client in sites.house.pool})
    client = sites.house.pool[WorkerId("decode-0")]
    await until(lambda: client.state == "gone")
    assert f"layout sim-kv1-{BLOCK_SIZE}-4096" in client.phase


async def test_a_worker_that_takes_no_part(sites):
    _, prefill = await sites.start("prefill-0")
    _, decode = await sites.start("decode-0", num_rows=0)
    request = a_prompt(1)
    tokens, handle = await prefilled(prefill, request)
    with pytest.raises(WorkerLost, match="takes no part"):
        decode.kv.fetch(request, handle)
    assert await prefilled(decode, request) == (tokens, None)
    async with asyncio.timeout(5):  # it answers, though it has no leases
        assert not await decode.kv.release(handle.lease_id, 50)
