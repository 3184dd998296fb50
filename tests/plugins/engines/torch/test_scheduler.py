"""The scheduler without a model: tokens are appended by the test."""

from __future__ import annotations

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import Request, RequestId, SamplingParams
from trtserve.plugins.engines.torch.prefix_cache import BlockChain, PrefixCache
from trtserve.plugins.engines.torch.sampler import Sampler
from trtserve.plugins.engines.torch.scheduler import Scheduler
from trtserve.plugins.engines.torch.sequence import Sequence

SIZE = 4
SAMPLER = Sampler(1000, 0, torch.device("cpu"))


def sequence_of(request_id, num_prompt, max_tokens=4, first=0):
    prompt = array("i", ((first + place) % 1000 for place in range(num_prompt)))
    request = Request(RequestId(request_id), prompt, SamplingParams(max_tokens=max_tokens, temperature=0))
    return Sequence(request, BlockChain(SIZE), SAMPLER.state(request))


def run_pass(scheduler):
    """One pass: every complete sequence gets a token and ends at its max_tokens. Returns (id, count) pairs."""
    work = scheduler.schedule()
    sampled = [item.sequence for item in work if item.is_complete]
    done = [(item.sequence.request.id, item.count) for item in work]
    scheduler.complete(work)
    for sequence in sampled:
        sequence.tokens.append(len(sequence.tokens) % 1000)
        if sequence.num_generated >= sequence.request.sampling.max_tokens:
            scheduler.remove(sequence.request.id)
    return done


def make(num_blocks=64, max_num_seqs=8, max_num_tokens=16, caching=False):
    cache = PrefixCache(num_blocks, SIZE, enabled=caching)
    return Scheduler(cache, max_num_seqs, max_num_tokens), cache.pool


def test_prompts_are_taken_in_chunks_of_the_budget_in_order_of_arrival():
    scheduler, _ = make(max_num_tokens=16)
    scheduler.add(sequence_of(1, 20))
    scheduler.add(sequence_of(2, 10, first=500))
    assert run_pass(scheduler) == [(1, 16)]
    assert run_pass(scheduler) == [(1, 4), (2, 10)]
    assert run_pass(scheduler) == [(1, 1), (2, 1)]


def test_decodes_come_before_prefills_in_the_budget():
    scheduler, _ = make(max_num_tokens=16)
    scheduler.add(sequence_of(1, 4))
    run_pass(scheduler)
    scheduler.add(sequence_of(2, 40, first=500))
    assert run_pass(scheduler) == [(1, 1), (2, 15)]


def test_no_more_than_max_num_seqs_run():
    scheduler, _ = make(max_num_seqs=2, max_num_tokens=64)
    for request_id in (1, 2, 3):
        scheduler.add(sequence_of(request_id, 4, max_tokens=1, first=request_id * 100))
    assert run_pass(scheduler) == [(1, 4), (2, 4)]
    assert run_pass(scheduler) == [(3, 4)]


def test_a_long_request_at_the_head_is_not_overtaken():
    scheduler, pool = make(num_blocks=6, max_num_tokens=64)
    scheduler.add(sequence_of(1, 12, max_tokens=2))
    scheduler.add(sequence_of(2, 20, max_tokens=1, first=100))
    scheduler.add(sequence_of(3, 2, max_tokens=1, first=200))
    assert run_pass(scheduler) == [(1, 12)]
    assert run_pass(scheduler) == [(1, 1)]
    assert run_pass(scheduler) == [(2, 20)]
    assert run_pass(scheduler) == [(3, 2)]
    assert pool.num_free == 6


def test_the_latest_arrival_gives_its_blocks_and_starts_over():
    scheduler, pool = make(num_blocks=6, max_num_tokens=64)
    scheduler.add(sequence_of(1, 8, max_tokens=12))
    scheduler.add(sequence_of(2, 4, max_tokens=9, first=100))
    finished = []
    for _ in range(60):
        finished.append(run_pass(scheduler))
        if not (scheduler.num_running or scheduler.num_waiting):
            break
    assert scheduler.preemptions_total >= 1
    # what was preempted comes back with its generated tokens as part of what it prefills
    assert any(count > 4 for done in finished for request_id, count in done if request_id == 2)
    assert pool.num_free == 6


def test_a_cached_prefix_is_not_computed_again_except_its_last_token():
    scheduler, _ = make(max_num_tokens=64, caching=True)
    scheduler.add(sequence_of(1, 16, max_tokens=1))
    run_pass(scheduler)
    again = sequence_of(2, 16, max_tokens=1)
    scheduler.add(again)
    assert run_pass(scheduler) == [(2, 4)]
    assert again.cached_tokens == 12
    assert (scheduler.prompt_tokens_total, scheduler.cached_tokens_total) == (32, 12)


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_remove_gives_everything_back(when):
    scheduler, pool = make(max_num_tokens=16)
    scheduler.add(sequence_of(1, 24))
    for _ in range({"waiting": 0, "prefill": 1, "decode": 3}[when]):
        run_pass(scheduler)
    assert scheduler.remove(RequestId(1)) is not None
    assert scheduler.remove(RequestId(1)) is None
    assert pool.num_free == pool.num_blocks
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.schedule() == []


@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=10),
    removals=st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=4),
    num_blocks=st.integers(8, 20),
    max_num_tokens=st.integers(4, 40),
    caching=st.booleans(),
)
def test_everything_ends_within_limits_and_nothing_leaks(requests, removals, num_blocks, max_num_tokens, caching):
    scheduler, pool = make(num_blocks, 4, max_num_tokens, caching)
    sequences = [sequence_of(i, prompt, most, first=start) for i, (prompt, most, start) in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    removed = set()
    for number in range(500):
        if not (scheduler.num_running or scheduler.num_waiting):
            break
        if number in removals and scheduler.remove(RequestId(removals[number])) is not None:
            removed.add(removals[number])
        done = run_pass(scheduler)
        assert sum(count for _, count in done) <= max_num_tokens
        assert scheduler.num_running <= 4
        assert done or not (scheduler.num_running or scheduler.num_waiting)
    assert pool.num_free == pool.num_blocks
    for sequence in sequences:
        if sequence.request.id not in removed:
            assert sequence.num_generated == sequence.request.sampling.max_tokens
