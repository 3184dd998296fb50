"""From GenerationParams to the engine's SamplingParams: defaults, context, seeds, vocabulary, the header."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import SamplingParams
from trtserve.server.api.parameters import (
    GenerationParams,
    SamplingDefaults,
    choice_seed,
    ignored_header,
    max_tokens_for,
    sampling_defaults,
    to_sampling_params,
)
from trtserve.server.errors import ContextLengthExceeded, InvalidRequest

CHAT = GenerationParams(model="sim", messages=({"role": "user", "content": "a"},))


def test_a_silent_request_takes_the_defaults():
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1)
    assert to_sampling_params(CHAT, defaults, 1000, 50, 0) == SamplingParams(
        max_tokens=50, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
    )


def test_what_a_request_says_wins_even_where_it_is_zero():
    defaults = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1)
    params = GenerationParams(
        model="sim", max_tokens=5, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, logprobs=0
    )
    assert to_sampling_params(params, defaults, 1000, 50, 0) == SamplingParams(
        max_tokens=5, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, logprobs=0
    )


def test_several_greedy_choices_are_refused_though_the_default_is_to_blame():
    with pytest.raises(InvalidRequest, match="n is 2 with temperature 0"):
        to_sampling_params(GenerationParams(model="sim", n=2), SamplingDefaults(temperature=0.0), 1000, 50, 0)


@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 127))
def test_choice_seeds_are_int64_distinct_and_start_at_the_seed(seed: int, index: int):
    assert choice_seed(seed, 0) == seed
    assert -(2**63) <= choice_seed(seed, index) < 2**63
    assert (choice_seed(seed, index) - seed) % 2**64 == index


def test_a_seed_wraps():
    params = GenerationParams(model="sim", n=2, seed=2**63 - 1)
    assert to_sampling_params(params, SamplingDefaults(), 1000, 50, 1).seed == -(2**63)
    assert to_sampling_params(CHAT, SamplingDefaults(), 1000, 50, 1).seed is None


@given(
    prompt=st.integers(1, 300),
    asked=st.none() | st.integers(1, 300),
    least=st.integers(0, 300),
    most=st.integers(1, 300),
)
def test_prompt_and_output_always_fit(prompt: int, asked: int | None, least: int, most: int):
    params = GenerationParams(model="sim", max_tokens=asked, min_tokens=least)
    try:
        granted = max_tokens_for(params, prompt, most)
    except ContextLengthExceeded as error:
        assert prompt + (asked or 1) > most
        assert str(prompt) in error.message
        assert str(most) in error.message
    except InvalidRequest as error:
        assert error.param == "min_tokens"
        assert least > (asked or most - prompt)
    else:
        assert least <= granted
        assert 1 <= granted <= most - prompt
        assert granted == (asked or most - prompt)


def test_an_empty_prompt_blames_the_field_it_came_from():
    with pytest.raises(InvalidRequest) as caught:
        max_tokens_for(CHAT, 0, 100)
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest) as caught:
        max_tokens_for(GenerationParams(model="sim", prompts=("a",)), 0, 100)
    assert caught.value.param == "prompt"


def test_generation_config_values_out_of_bounds_are_left():
    config = {"temperature": 0.6, "top_p": 0, "top_k": 20.0, "min_p": True, "repetition_penalty": None, "eos": [1]}
    assert sampling_defaults(config) == SamplingDefaults(temperature=0.6, top_k=20)
    assert sampling_defaults({}) == SamplingDefaults()


@given(st.lists(st.text(max_size=100), max_size=60))
def test_the_header_of_ignored_names_is_one_safe_line(names: list[str]):
    line = ignored_header(tuple(names))
    assert len(line) <= 512
    assert line.isascii()
    assert line.isprintable()


def test_the_header_of_ignored_names_lists_them():
    assert ignored_header(("alpha", "a b\r\nc")) == "alpha, a?b??c"
    assert ignored_header(tuple(f"name{i}" for i in range(200))).endswith(", ...")
