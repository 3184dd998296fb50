"""Drawing: exact probabilities on small vocabularies, checked by walking through all of chance."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.engines.torch.token_draw import Draw, draw_tokens, uniform

LOGITS = [1.0, 0.3, -0.5, 2.0, 0.0, -1.0, 1.2, 0.9]
STEPS = 2000


def expected(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by the rules, in plain Python."""
    peak = max(logits)
    weights = [math.exp((logit - peak) / temperature) for logit in logits]
    weights = [weight / sum(weights) for weight in weights]
    kept = {i for i, weight in enumerate(weights) if weight >= min_p * max(weights)}
    ranked = sorted(kept, key=lambda i: -weights[i])[: top_k or len(logits)]
    total, before, nucleus = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if before < top_p * total:
            nucleus.append(i)
        before += weights[i]
    mass = sum(weights[i] for i in nucleus)
    return {i: weights[i] / mass for i in nucleus}


def shares(logits, stages=(64,), **rules):
    """How often each token comes when chance takes evenly spaced values."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **rules}
    draws = [Draw(**settings, chance=(step + 0.5) / STEPS) for step in range(STEPS)]
    tokens = draw_tokens(torch.tensor([logits]).repeat(STEPS, 1), draws, stages)
    return {token: count / STEPS for token, count in Counter(tokens).items()}


RULES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("stages", [(1, 3), (3,), (64,)])
def test_every_token_comes_as_often_as_it_should(rules, stages):
    wanted = expected(LOGITS, **rules)
    got = shares(LOGITS, stages, **rules)
    assert set(got) == set(wanted)
    for token, share in wanted.items():
        assert got[token] == pytest.approx(share, abs=1.5 / STEPS)


@settings(max_examples=60, deadline=None)
@given(
    # no two values nearly equal: rounding would then decide which one comes first
    logits=st.lists(st.integers(-40, 40).map(lambda halves: halves / 2), min_size=2, max_size=12),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    stage=st.integers(1, 12),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_only_allowed_tokens_come(logits, temperature, top_k, top_p, min_p, stage, chance):
    (token,) = draw_tokens(torch.tensor([logits]), [Draw(temperature, top_k, top_p, min_p, chance)], (stage,))
    allowed = expected(logits, temperature, top_k, top_p * 1.0001, min_p * 0.9999)
    ties = {i for i in range(len(logits)) if any(logits[i] == logits[j] for j in allowed)}
    assert token in allowed or token in ties


def test_rows_do_not_influence_one_another():
    generator = torch.Generator().manual_seed(0)
    # rounded: many tokens are equally likely, and their order must not depend on the company either
    logits = (torch.randn(6, 1500, generator=generator) * 2).bfloat16().float()
    draws = [
        Draw(1.0, 0, 1.0, 0.0, 0.3),
        Draw(0.7, 5, 1.0, 0.0, 0.9),
        Draw(1.5, 0, 0.99, 0.0, 0.99),
        Draw(1.0, 300, 0.5, 0.0, 0.2),
        Draw(1.0, 0, 1.0, 0.2, 0.7),
        Draw(2.0, 0, 0.999, 0.01, 0.995),
    ]
    for chance in (0.001, 0.2, 0.5, 0.9, 0.999):
        draws = [replace(draw, chance=chance) for draw in draws]
        alone = [draw_tokens(logits[i : i + 1].clone(), [draw])[0] for i, draw in enumerate(draws)]
        assert draw_tokens(logits.clone(), draws) == alone
        assert draw_tokens(logits.flip(0), draws[::-1]) == alone[::-1]


def test_a_tiny_temperature_is_greedy():
    assert draw_tokens(torch.tensor([LOGITS]), [Draw(1e-38, 0, 1.0, 0.0, 0.99)]) == [3]


def test_a_token_without_probability_never_comes():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    for chance in (0.0, 0.4999999, 0.5, 1 - 2**-53):
        for top_p in (1.0, 0.999999):
            assert draw_tokens(logits.clone(), [Draw(1.0, 0, top_p, 0.0, chance)])[0] in (0, 2)


def test_uniform_is_even_in_positions_and_in_keys():
    for values in ([uniform(5, i) for i in range(4000)], [uniform(i, 5) for i in range(4000)]):
        assert all(0 <= value < 1 for value in values)
        counts = Counter(int(value * 10) for value in values)
        assert all(abs(counts[tenth] - 400) < 80 for tenth in range(10))
    assert uniform(1, 2) == uniform(1, 2) != uniform(2, 1)


def test_a_large_vocabulary_is_drawn_as_evenly_as_a_small_one():
    num_tokens, num_draws = 1000, 4000
    draws = [Draw(1.0, 0, 1.0, 0.0, (step + 0.5) / num_draws) for step in range(num_draws)]
    tokens = draw_tokens(torch.zeros(num_draws, num_tokens), draws)
    assert set(Counter(tokens).values()) == {num_draws // num_tokens}
    assert tokens == sorted(tokens)
