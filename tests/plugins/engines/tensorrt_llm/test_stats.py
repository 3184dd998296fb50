"""Statistics are read name by name, whatever is missing; the load is counted from requests alone."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import PassStats, Request, SamplingParams, WorkerLoad
from trtserve.plugins.engines.tensorrt_llm.stats import LoadBook, num_blocks, pass_stats

ITERATION = {
    "iterLatencyMS": 12.5,
    "kvCacheStats": {"maxNumBlocks": 100, "usedNumBlocks": 6, "tokensPerBlock": 32},
    "inflightBatchingStats": {"numCtxTokens": 40, "numGenRequests": 3},
}


def without(*path):
    stats = json.loads(json.dumps(ITERATION))
    owner = stats
    for name in path[:-1]:
        owner = owner[name]
    del owner[path[-1]]
    return stats


def test_an_iteration():
    assert pass_stats(ITERATION) == PassStats(0.0125, 40, 3, 192)
    assert num_blocks(ITERATION) == 100


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("iterLatencyMS",), None),
        (("inflightBatchingStats",), None),
        (("inflightBatchingStats", "numCtxTokens"), PassStats(0.0125, 0, 3, 192)),
        (("inflightBatchingStats", "numGenRequests"), PassStats(0.0125, 40, 0, 0)),
        (("kvCacheStats",), PassStats(0.0125, 40, 3, 3)),
        (("kvCacheStats", "tokensPerBlock"), PassStats(0.0125, 40, 3, 3)),
    ],
)
def test_what_is_missing(path, expected):
    assert pass_stats(without(*path)) == expected


def test_an_idle_iteration_is_none():
    assert pass_stats(ITERATION | {"inflightBatchingStats": {"numCtxTokens": 0, "numGenRequests": 0}}) is None


odd = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(), st.lists(st.none()))
names = st.sampled_from(["iterLatencyMS", "maxNumBlocks", "usedNumBlocks", "tokensPerBlock", "numCtxTokens"])
mappings = st.dictionaries(names, odd)


@given(st.builds(lambda stats, **nested: {**stats, **nested}, mappings, kvCacheStats=st.one_of(odd, mappings),
                 inflightBatchingStats=st.one_of(odd, mappings)))  # fmt: skip
def test_odd_values_are_never_an_error(stats):
    passed = pass_stats(stats)
    assert passed is None or (passed.duration_s > 0 and passed.context_tokens >= passed.decode_sequences)
    count = num_blocks(stats)
    assert count is None or count > 0


def request(number, num_tokens):
    return Request(number, array("i", range(num_tokens)), SamplingParams(max_tokens=100))


requests = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 5), max_size=4)), max_size=8)


@given(requests, st.randoms())
def test_a_book_is_empty_when_all_have_ended(requests, random):
    book = LoadBook(4, num_draft_tokens=2)
    book.start(10_000)
    calls = {}
    for number, (prompt, steps) in enumerate(requests):
        calls[number] = [lambda n=number, p=prompt: book.submitted(request(n, p))]
        for place, count in enumerate(steps):
            calls[number].append(lambda n=number, c=count, p=place: book.generated(n, c, 0 if p == 0 else None))
        calls[number].append(lambda s=steps: book.speculated(sum(s), len(s)))
        calls[number].append(lambda n=number: book.ended(n))
    while any(calls.values()):
        calls[random.choice([number for number, left in calls.items() if left])].pop(0)()
        load = book.load()
        assert load.running + load.waiting <= len(requests)
        assert load.free_blocks <= 10_000
    load = book.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, 10_000)
    assert load.generated_tokens_total == sum(sum(steps) for _, steps in requests)
    assert load.prompt_tokens_total == sum(prompt for prompt, steps in requests if steps)
    assert load.accepted_tokens_total <= load.drafted_tokens_total
    assert load.drafted_tokens_total == 2 * sum(len(steps) for _, steps in requests)


def test_what_a_book_says_while_one_runs():
    book = LoadBook(4, num_draft_tokens=0)
    book.start(10)
    book.submitted(request(1, 9))
    assert book.load() == WorkerLoad(waiting=1, free_blocks=7)
    book.generated(1, 4, 8)
    expected = WorkerLoad(
        running=1, free_blocks=6, prompt_tokens_total=9, cached_tokens_total=8, generated_tokens_total=4
    )
    assert book.load() == expected
