"""Fetches whose reads hang, fail or end late: told in time, and no row is used while something may write to it."""

import asyncio

import pytest

from tests.server.workers.conftest import until
from tests.server.workers.held_transfer import HeldTransfer
from tests.server.workers.kv_sites import a_prompt, connected, decoded, nothing_is_left, prefilled, resumed, usage_of
from tests.server.workers.kv_worker import NUM_ROWS
from trtserve.plugins.transfer_api import TransferOutcome
from trtserve.server.workers.kv_memory import TransferChoice
from trtserve.server.workers.kv_transport import read_deadline_s


class Clock:
    """Stands still unless told otherwise."""

    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    """The decode worker's."""
    return Clock()


@pytest.fixture
def held():
    """The decode worker's transfer."""
    return HeldTransfer()


@pytest.fixture
async def pair(sites, held, clock):
    _, prefill = await sites.start("prefill-0")
    choice = TransferChoice({"shm": lambda: held}, is_required=True)
    _, decode = await sites.start("decode-0", choice=choice, clock=clock)
    await connected(decode)
    return prefill, decode


async def begun(prefill, decode, held, number=1, num_tokens=80):
    """A fetch whose read is under way."""
    request = a_prompt(number, num_tokens)
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    await until(lambda: held.num_held >= 1)
    return request, tokens, handle


async def test_a_read_that_does_not_end_is_given_up(pair, held, clock):
    prefill, decode = pair
    request, tokens, _ = await begun(prefill, decode, held)
    clock.now_s += 32
    fetched = await decode.kv.fetched(request.id, 10)
    assert not fetched.ok and "did not end in time" in fetched.reason
    assert len(held.cancelled) >= 1
    decode.kv.commit(request.id, True)  # of nothing
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    usage = await usage_of(decode, lambda usage: usage.fetches == 0)
    assert (usage.rows_quarantined, usage.rows_free, usage.rows_fetched) == (10, NUM_ROWS - 10, 0)
    held.let_go()
    await nothing_is_left(decode)


@pytest.mark.parametrize("outcome", [TransferOutcome.FAILED, TransferOutcome.PEER_LOST, TransferOutcome.TIMED_OUT])
async def test_a_read_that_fails_is_told_at_once(pair, held, outcome, clock):
    prefill, decode = pair
    request, tokens, _ = await begun(prefill, decode, held)
    held.let_go(outcome)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks, fetched.reason) == (False, 0, "the test says so")
    decode.kv.abort(request.id)
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 0
    await nothing_is_left(decode)
    await connected(decode, 1 if outcome is TransferOutcome.FAILED else 0)
    clock.now_s += 2  # a connection that was lost is made again
    await connected(decode)


async def test_rows_of_an_aborted_read_wait_for_its_end(pair, held):
    prefill, decode = pair
    request, _, _ = await begun(prefill, decode, held)
    decode.kv.abort(request.id)
    usage = await usage_of(decode, lambda usage: usage.fetches == 0)
    assert (usage.rows_quarantined, usage.rows_free) == (10, NUM_ROWS - 10)
    assert len(held.cancelled) == 1
    held.let_go(TransferOutcome.CANCELLED)
    await nothing_is_left(decode)
    assert decode.kv.usage.reads_failed_total == 0


async def test_what_was_read_before_a_failure_can_be_used(pair, held):
    """Parts follow one another; the front is as good as if it were all."""
    prefill, decode = pair
    request = a_prompt(1, num_tokens=80)
    tokens, handle = await prefilled(prefill, request)
    fields = {name: getattr(handle, name) for name in handle.__slots__}
    first = type(handle)(**fields | {"rows": handle.rows[:4], "is_final": False})
    second = type(handle)(**fields | {"first_block": 4, "rows": handle.rows[4:]})
    held.let_go()
    decode.kv.fetch(request, first)
    await usage_of(decode, lambda usage: usage.bytes_read_total == 4 * 8 * 1024)
    held.let_go(None)
    decode.kv.fetch(request, second)
    await until(lambda: held.num_held == 1)
    held.let_go(TransferOutcome.FAILED)
    fetched = await decode.kv.fetched(request.id, 10)
    assert (fetched.ok, fetched.num_blocks) == (False, 4)
    decode.kv.commit(request.id, await prefill.kv.release(handle.lease_id, 5))
    assert (await decoded(decode, resumed(request, tokens))).cached_tokens == 32
    await nothing_is_left(prefill, decode)


async def test_a_peer_that_hangs_gets_few_reads_at_a_time(pair, held):
    prefill, decode = pair
    requests = [a_prompt(number, num_tokens=40) for number in range(1, 7)]
    for request in requests:
        _, handle = await prefilled(prefill, request)
        decode.kv.fetch(request, handle)
    await usage_of(decode, lambda usage: usage.rows_fetched == 30)
    assert held.num_held == 2
    decode.kv.abort(requests[5].id)  # waits for its turn
    await usage_of(decode, lambda usage: (usage.rows_fetched, usage.rows_quarantined) == (25, 0))
    held.let_go()
    for request in requests[:5]:
        assert (await decode.kv.fetched(request.id, 10)).num_blocks == 5
        decode.kv.commit(request.id, False)
    await nothing_is_left(decode)


async def test_reads_of_a_peer_that_is_gone_end(sites, pair, held):
    prefill, decode = pair
    requests = [a_prompt(number, num_tokens=40) for number in range(1, 4)]
    for request in requests:
        _, handle = await prefilled(prefill, request)
        decode.kv.fetch(request, handle)
    await until(lambda: held.num_held == 2)
    sites.started[0].end()
    waiting = await decode.kv.fetched(requests[2].id, 10)
    assert (waiting.ok, waiting.reason) == (False, "the peer is gone")
    held.let_go(TransferOutcome.PEER_LOST)
    for request in requests:
        assert not (await decode.kv.fetched(request.id, 10)).ok
        decode.kv.commit(request.id, False)
    await nothing_is_left(decode)
    await asyncio.sleep(0)


async def test_a_fetch_that_nobody_ends_is_forgotten(pair, held, clock):
    prefill, decode = pair
    held.let_go()
    request = a_prompt(1, num_tokens=80)
    _, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    await decode.kv.fetched(request.id, 10)
    await usage_of(decode, lambda usage: (usage.fetches, usage.rows_fetched) == (1, 10))
    clock.now_s += 121
    await nothing_is_left(decode)


async def test_a_peer_that_cannot_be_imported_is_tried_again(sites, held, clock, caplog):
    held.refusals = 2
    _, prefill = await sites.start("prefill-0")
    choice = TransferChoice({"shm": lambda: held}, is_required=True)
    _, decode = await sites.start("decode-0", choice=choice, clock=clock)
    request = a_prompt(1)
    _, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    fetched = await decode.kv.fetched(request.id, 10)
    assert not fetched.ok and "not connected: shm: not today" in fetched.reason
    clock.now_s += 1.5
    # Its next try is planned from the clock once the second has failed, not when it is refused.
    await until(lambda: caplog.messages.count("worker prefill-0 is not connected: shm: not today") == 2)
    clock.now_s += 2.5
    await connected(decode)


@pytest.mark.parametrize(
    ("num_bytes", "bandwidth", "deadline_s"), [(0, 1e9, 2.0), (10**9, 1e10, 3.0), (10**12, 1e9, 30.0), (1, 0.0, 30.0)]
)
def test_a_read_s_deadline(num_bytes, bandwidth, deadline_s):
    assert read_deadline_s(num_bytes, bandwidth) == pytest.approx(deadline_s)
