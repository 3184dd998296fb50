"""The sampler: penalties, bias, delayed ends and log probabilities against plain Python."""

from __future__ import annotations

import math
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import Request, RequestId, SamplingParams
from trtserve.plugins.engines.torch.sampler import Sampler

VOCAB = 8
CPU = torch.device("cpu")


def state_of(sampler, prompt=(1, 2), eos=(), num_resumed=0, **params):
    wanted = SamplingParams(**{"max_tokens": 9, "temperature": 0.0, **params})
    return sampler.state(Request(RequestId(1), array("i", prompt), wanted, eos, num_resumed=num_resumed))


@pytest.fixture
def sampler():
    return Sampler(VOCAB, 0, CPU)


def plain_penalties(logits, prompt, output, repetition, presence, frequency, bias):
    result = list(logits)
    for token in range(len(logits)):
        count = output.count(token)
        if count or token in prompt:
            result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
        result[token] -= frequency * count + presence * (count > 0)
    for token, value in bias:
        result[token] += value
    return result


@settings(max_examples=50, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
    rows=st.lists(st.lists(st.floats(-5, 5, width=32), min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=6),
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
)
def test_penalties_and_bias_are_those_of_the_rules(prompt, rows, repetition, presence, frequency, bias):
    sampler = Sampler(VOCAB, 0, CPU)
    state = state_of(
        sampler,
        prompt,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
        logprobs=VOCAB,
    )
    output = []
    for row in rows:
        wanted = plain_penalties(row, prompt, output, repetition, presence, frequency, bias.items())
        total = math.log(sum(math.exp(value) for value in wanted))
        (result,) = sampler.sample(torch.tensor([row]), [state])
        assert wanted[result.token_id] == pytest.approx(max(wanted), abs=1e-4)
        for token, logprob in result.logprob.top:
            assert logprob == pytest.approx(wanted[token] - total, abs=1e-4)
        output.append(result.token_id)


def test_logits_are_left_as_they_are(sampler):
    logits = torch.randn(1, VOCAB)
    before = logits.clone()
    sampler.sample(logits, [state_of(sampler, logit_bias=((1, 5.0),), min_tokens=3, eos=(2,), temperature=1.0)])
    assert torch.equal(logits, before)


def test_ends_wait_for_min_tokens(sampler):
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0, 2.0, 0.0, 0.0, 0.0]])
    state = state_of(sampler, eos=(2,), stop_token_ids=(3,), min_tokens=2)
    assert [sampler.sample(logits, [state])[0].token_id for _ in range(4)] == [4, 4, 2, 2]


def test_an_ignored_end_is_an_ordinary_token_from_the_start(sampler):
    logits = torch.tensor([[0.0, 1.0, 9.0, 8.0, 2.0, 0.0, 0.0, 0.0]])
    state = state_of(sampler, eos=(2,), ignore_eos=True, min_tokens=2)
    assert sampler.sample(logits, [state])[0].token_id == 2


def test_log_probabilities_do_not_know_temperature_or_truncation(sampler):
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0, -1.0, 0.5, 0.2, 0.1]])
    wanted = torch.log_softmax(logits[0], -1)
    state = state_of(sampler, temperature=0.1, top_k=1, logprobs=3)
    (result,) = sampler.sample(logits, [state])
    assert result.token_id == 2
    assert result.logprob.logprob == pytest.approx(wanted[2].item())
    assert [token for token, _ in result.logprob.top] == [2, 3, 1]
    assert [value for _, value in result.logprob.top] == pytest.approx(wanted[[2, 3, 1]].tolist())


def test_no_alternatives_are_given_unless_asked_for(sampler):
    logits = torch.randn(2, VOCAB)
    none, chosen = sampler.sample(logits, [state_of(sampler), state_of(sampler, logprobs=0)])
    assert none.logprob is None
    assert chosen.logprob.top == () and chosen.logprob.token_id == chosen.token_id


def test_a_seed_gives_the_same_tokens_in_any_company(sampler):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(12, 1, VOCAB, generator=generator)
    alone, company = state_of(sampler, temperature=1.0, seed=-5), state_of(sampler, temperature=1.0, seed=-5)
    others = [state_of(sampler, temperature=1.0, top_p=0.5), state_of(sampler), state_of(sampler, temperature=2.0)]
    first = [sampler.sample(row, [alone])[0].token_id for row in rows]
    second = []
    for row in rows:
        logits = torch.cat([torch.randn(2, VOCAB), row, torch.randn(1, VOCAB)])
        second.append(sampler.sample(logits, [others[0], others[1], company, others[2]])[2].token_id)
    assert first == second
    assert len(set(first)) > 1


def test_requests_without_a_seed_differ_and_follow_the_engine(sampler):
    rows = torch.zeros(20, 1, VOCAB)

    def tokens(sampler):
        state = state_of(sampler, temperature=1.0)
        return [sampler.sample(row, [state])[0].token_id for row in rows]

    first, second = tokens(sampler), tokens(sampler)
    again = Sampler(VOCAB, 0, CPU)
    assert first != second
    assert (first, second) == (tokens(again), tokens(again))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "logprobs": 2}])
def test_broken_rows_are_told_and_others_are_not_hurt(sampler, value, params):
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = value
    logits[:, 5] = 50
    results = sampler.sample(logits, [state_of(sampler, **params) for _ in range(3)])
    assert [result.is_broken for result in results] == [False, True, False]
    assert results[0].token_id == results[2].token_id == 5


def test_padding_of_the_vocabulary_is_never_chosen(sampler):
    logits = torch.zeros(2, VOCAB + 3)
    logits[:, VOCAB:] = 9
    results = sampler.sample(logits, [state_of(sampler), state_of(sampler, temperature=1.0)])
    assert all(result.token_id < VOCAB for result in results)


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=6),
    num_more=st.integers(1, 4),
    chance=st.randoms(use_true_random=False),
    temperature=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=60, deadline=None)
def test_a_resumed_state_is_where_the_first_one_got_to(prompt, output, num_more, chance, temperature):
    params = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "temperature": temperature,
        "seed": 9,
    }
    sampler = Sampler(VOCAB, 0, CPU)
    whole = state_of(sampler, prompt, **params)
    for token in output:  # logits that leave no choice
        forced = torch.full((1, VOCAB), -1e4)
        forced[0, token] = 1e4
        assert sampler.sample(forced, [whole])[0].token_id == token
    resumed = state_of(sampler, (*prompt, *output), num_resumed=len(output), **params)
    for _ in range(num_more):
        logits = torch.tensor([[chance.gauss(0, 2) for _ in range(VOCAB)]])
        first, second = (sampler.sample(logits, [state])[0] for state in (whole, resumed))
        assert first == second


def test_min_tokens_count_from_where_a_request_was_resumed(sampler):
    state = state_of(sampler, (1, 2, 3, 4), eos=(5,), num_resumed=3, min_tokens=2)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 3
    assert [sampler.sample(logits, [state])[0].token_id == 5 for _ in range(3)] == [False, False, True]
