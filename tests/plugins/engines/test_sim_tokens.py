"""The simulated model's tokens: a pure function of what was said before."""

import math
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim.tokens import TokenModel

MODEL = TokenModel(first_token_id=1000, last_token_id=1999)


def stream(prompt, model=MODEL, eos=(2,), **sampling):
    params = SamplingParams(**{"max_tokens": 100, "temperature": 0.0, **sampling})
    return model.stream(Request(RequestId(1), array("i", prompt), params, eos))


def tokens(prompt, count, may_end=True, **arguments):
    source = stream(prompt, **arguments)
    return [source.next(may_end) for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(prompt=st.lists(st.integers(0, 10**6), min_size=1, max_size=600), cut=st.integers(0, 40))
def test_a_replay_from_the_middle_goes_on_the_same(prompt, cut):
    whole = tokens(prompt, 40)
    assert tokens(prompt + whole[:cut], 40 - cut) == whole[cut:]
    assert all(1000 <= token_id <= 1999 for token_id in whole)


def test_every_token_before_counts():
    first = tokens([5] * 300, 16)
    assert first != tokens([6] + [5] * 299, 16)
    assert first != tokens([5] * 301, 16)
    assert len(set(first)) > 8


def test_the_seed_counts_when_sampling_only():
    greedy = tokens([1, 2, 3], 16)
    assert tokens([1, 2, 3], 16, seed=9) == greedy
    sampled = tokens([1, 2, 3], 16, seed=9, temperature=0.7)
    assert sampled != greedy
    assert sampled == tokens([1, 2, 3], 16, seed=9, temperature=1.3)
    assert tokens([1, 2, 3], 16, seed=-9, temperature=0.7) not in (sampled, greedy)
    assert tokens([1, 2, 3], 16, model=TokenModel(1000, 1999, seed=4)) != greedy


def test_end_of_sequence_only_on_purpose():
    crowded = TokenModel(first_token_id=0, last_token_id=39)
    ends = tuple(range(5, 35))
    assert not set(tokens([1], 500, model=crowded, eos=ends)) & set(ends)
    ending = TokenModel(1000, 1999, eos_probability=0.25)
    said = tokens([1], 4000, model=ending)
    assert 0.2 < said.count(2) / 4000 < 0.3
    assert 2 not in tokens([1], 4000, model=ending, may_end=False)
    assert tokens([1], 3, model=TokenModel(1000, 1999, eos_probability=1.0)) == [2, 2, 2]
    assert 2 not in tokens([1], 100, model=ending, eos=())


def test_stop_tokens_wait_for_min_tokens():
    free = tokens([1], 20)
    assert tokens([1], 20, stop_token_ids=tuple(free)) == free
    assert not set(tokens([1], 20, may_end=False, stop_token_ids=tuple(free))) & set(free)


def test_banning_every_token_still_gives_one():
    narrow = TokenModel(first_token_id=0, last_token_id=31)
    (token_id,) = tokens([1], 1, model=narrow, eos=tuple(range(64)))
    assert 0 <= token_id <= 31


def test_logprobs_are_probabilities_with_the_chosen_token_first():
    source = stream([1, 2, 3])
    for _ in range(50):
        token_id = source.next(True)
        logprob = source.logprob(token_id, 5)
        assert logprob.token_id == logprob.top[0][0] == token_id
        assert logprob.logprob == logprob.top[0][1]
        assert [value for _, value in logprob.top] == sorted((value for _, value in logprob.top), reverse=True)
        assert math.fsum(math.exp(value) for _, value in logprob.top) < 1
        assert source.logprob(token_id, 0).top == ()
        assert source.logprob(token_id, 5) == logprob
