"""A request's sampling in TensorRT-LLM's words: nothing that matters is left to its defaults."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import KVHandle, Request, SamplingParams
from trtserve.plugins.engines.tensorrt_llm.sampling import NO_TOKEN, SAMPLING_KEYWORDS, sampling_keywords

HANDLE = KVHandle(1, "", 0, 0, ())
PLAIN = {
    "end_id": 2,
    "pad_id": 2,
    "max_tokens": 9,
    "ignore_eos": False,
    "include_stop_str_in_output": True,
    "detokenize": False,
    "add_special_tokens": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
}


def keywords(eos=(2,), num_resumed=0, kv_handle=None, **fields):
    sampling = SamplingParams(**{"max_tokens": 9, **fields})
    prompt = array("i", [5, 6, 7, 8])
    return sampling_keywords(Request(1, prompt, sampling, eos, num_resumed=num_resumed, kv_handle=kv_handle))


def test_nothing_asked_for_is_said_all_the_same():
    assert keywords() == PLAIN


@pytest.mark.parametrize(
    ("fields", "more"),
    [
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5}, {"temperature": 0.5, "top_p": 0.9, "top_k": 5}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"presence_penalty": -0.5}, {"presence_penalty": -0.5}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"logprobs": 0}, {"logprobs": 1}),
        ({"logprobs": 5}, {"logprobs": 5}),
        ({"stop_token_ids": (7, 2, 7)}, {"stop_token_ids": [7]}),
        ({"eos": (2, 3, 4), "stop_token_ids": (3, 7)}, {"stop_token_ids": [3, 7, 4]}),
        ({"eos": ()}, {"end_id": NO_TOKEN, "pad_id": 0}),
        ({"ignore_eos": True, "eos": (2, 3)}, {"end_id": NO_TOKEN, "pad_id": 0, "ignore_eos": True}),
        ({"ignore_eos": True, "stop_token_ids": (2,)},
         {"end_id": NO_TOKEN, "pad_id": 0, "ignore_eos": True, "stop_token_ids": [2]}),
        ({"num_resumed": 2}, {}),
        ({"num_resumed": 2, "kv_handle": HANDLE, "min_tokens": 3}, {"max_tokens": 11, "min_tokens": 5}),
    ],
)  # fmt: skip
def test_each_field(fields, more):
    assert keywords(**fields) == PLAIN | more


def test_greedy_in_every_version():
    greedy = keywords(temperature=0.0, top_p=0.5, seed=7)
    assert greedy == {name: value for name, value in PLAIN.items() if name not in ("temperature", "top_p")} | {
        "top_k": 1
    }


params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 4096),
    min_tokens=st.integers(0, 9),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)


@given(params, st.lists(st.integers(0, 9), max_size=3, unique=True).map(tuple))
def test_what_always_holds(sampling, eos):
    given = sampling_keywords(Request(1, array("i", [5]), sampling, eos))
    assert given.keys() <= SAMPLING_KEYWORDS
    assert given["end_id"] is not None and given["pad_id"] >= 0 and given["max_tokens"] >= 1
    assert given["top_k"] >= 0 and 0 <= given.get("seed", 0) < 2**64
    is_greedy = given["top_k"] == 1 or given.get("temperature") == 0 or given.get("top_p") == 0
    assert is_greedy is (sampling.temperature == 0 or sampling.top_k == 1)
    ends = {given["end_id"], *given.get("stop_token_ids", ())} - {NO_TOKEN}
    assert ends == set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos))
