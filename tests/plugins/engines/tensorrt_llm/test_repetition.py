"""Whether a generation phase repeats its context phase's tokens is learnt, and never wrongly."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest

from trtserve.plugins.api import Request, SamplingParams
from trtserve.plugins.engines.tensorrt_llm.repetition import FirstTokens

FIRST = 50


def request(max_tokens=3, num_resumed=1):
    return Request(1, array("i", [5, 6, FIRST]), SamplingParams(max_tokens=max_tokens), num_resumed=num_resumed)


def output(*token_ids, reason="length"):
    return SimpleNamespace(token_ids=list(token_ids), finish_reason=reason)


@pytest.fixture
def first_tokens():
    return FirstTokens(max_seq_len=100)


def test_repeated(first_tokens):
    assert first_tokens.num_repeated(request(), [FIRST]) == 1
    first_tokens.learn(request(), output(FIRST, 1, 2, 3))
    assert first_tokens.are_repeated is True


def test_another_beginning_says_it_at_once(first_tokens):
    assert first_tokens.num_repeated(request(), [1]) == 0
    assert first_tokens.num_repeated(request(), [FIRST]) == 0


def test_not_repeated_although_it_begins_alike(first_tokens):
    assert first_tokens.num_repeated(request(), [FIRST]) == 1  # a guess
    first_tokens.learn(request(), output(FIRST, 1, 2))
    assert first_tokens.num_repeated(request(), [FIRST]) == 0


@pytest.mark.parametrize(
    ("asked", "ended"),
    [
        (request(), output(FIRST, 1, 2, reason="stop")),
        (request(max_tokens=97), output(*[FIRST] * 97)),  # met the longest sequence, one token early
        (request(max_tokens=9), output(FIRST, 1)),
        (request(num_resumed=0), output(1, 2, 3)),
    ],
)
def test_what_teaches_nothing(first_tokens, asked, ended):
    first_tokens.learn(asked, ended)
    assert first_tokens.are_repeated is None
