"""Every row of the table of bad input, and arbitrary JSON: nothing but a ServeError ever comes of a bad body."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.server.api.bad_input import BAD_INPUT
from tests.server.api.bad_row import CHAT, COMPLETIONS, DETOKENIZE, MODEL, TOKENIZE, VOCAB_SIZE, BadInput
from trtserve.server.api.parameters import GenerationParams, SamplingDefaults, max_tokens_for, to_sampling_params
from trtserve.server.api.schema import (
    RequestRules,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from trtserve.server.api.schema_bodies import ChatCompletionBody, CompletionBody
from trtserve.server.api.schema_refusals import REFUSALS
from trtserve.server.errors import InvalidRequest, ServeError, body

RULES = RequestRules(served_models=(MODEL,), vocab_size=VOCAB_SIZE)
PARSERS: dict[str, Callable[[bytes, RequestRules], Any]] = {
    CHAT: parse_chat,
    COMPLETIONS: parse_completion,
    TOKENIZE: parse_tokenize,
    DETOKENIZE: parse_detokenize,
}


def accept(endpoint: str, raw: bytes, rules: RequestRules = RULES) -> Any:
    """What an endpoint does with a body before the engine is asked."""
    params = PARSERS[endpoint](raw, rules)
    if isinstance(params, GenerationParams):
        most = max_tokens_for(params, num_prompt_tokens=10, max_seq_len=2**31)
        for index in range(params.n):
            to_sampling_params(params, SamplingDefaults(), VOCAB_SIZE, most, index)
    return params


@pytest.mark.parametrize("row", BAD_INPUT, ids=lambda row: row.label)
def test_bad_input_names_the_field(row: BadInput):
    raw = row.body if isinstance(row.body, bytes) else json.dumps(row.body).encode()
    with pytest.raises(ServeError) as caught:
        accept(row.endpoint, raw)
    error = caught.value
    assert (error.status, error.param, error.code) == (row.status, row.param, row.code)
    assert len(error.message) < 400
    assert error.message.endswith(".")
    assert orjson.loads(body(error))["error"]["param"] == row.param


def test_the_table_is_large_and_has_no_row_twice():
    assert len(BAD_INPUT) >= 90
    assert len({(row.endpoint, repr(row.body)) for row in BAD_INPUT}) == len(BAD_INPUT)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"temperature": 3}, ["`temperature`", "3", "2 or less"]),
        ({"max_tokens": "5"}, ["`max_tokens`", 'the string "5"', "an integer"]),
        ({"max_tokens": 0}, ["0", "1 or more", "at least one token"]),
        ({"messages": [{"role": "robot", "content": "a"}]}, ["messages[0].role", '"robot"', "'assistant'"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["5", "a string or a list"]),
        ({"guided_json": {}, "guided_regex": "a"}, ["`guided_regex`", "response_format", "not available on this"]),
        ({"stop": [str(i) for i in range(40)]}, ["length of 40", "32 or less"]),
        ({"user": "x", "seed": "a" * 10_000}, ["`seed`", "...", "an integer"]),
    ],
)
def test_a_message_names_value_limit_and_cure(fields: dict[str, Any], parts: list[str]):
    raw = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": "a"}]} | fields)
    with pytest.raises(InvalidRequest) as caught:
        accept(CHAT, raw)
    for part in parts:
        assert part in caught.value.message


def test_a_wrong_model_is_told_what_is_served():
    with pytest.raises(ServeError, match="served here: sim"):
        accept(CHAT, b'{"model": "gpt", "messages": [{"role": "user", "content": "a"}]}')


def test_a_missing_model_is_an_error_where_there_are_several():
    rules = RequestRules(served_models=("a", "b"))
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(b'{"prompt": "x"}', rules)
    assert caught.value.param == "model"


def test_unknown_fields_can_be_rejected():
    rules = RequestRules(served_models=(MODEL,), unknown_params="reject")
    assert parse_completion(b'{"prompt": "x", "user": "me", "best_of": 1}', rules).ignored == ()
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(b'{"prompt": "x", "zeta": 1, "alpha": 1}', rules)
    assert (caught.value.param, caught.value.code) == ("alpha", "unknown_parameter")


def test_logprobs_are_refused_where_the_engine_has_none():
    rules = RequestRules(served_models=(MODEL,), max_logprobs=None)
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(b'{"prompt": "x", "logprobs": 0}', rules)
    assert (caught.value.param, caught.value.code) == ("logprobs", "unsupported_parameter")
    with pytest.raises(InvalidRequest):
        parse_chat(b'{"messages": [{"role": "user", "content": "a"}], "logprobs": true}', rules)


_SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
) | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab1é", max_size=3), inner),
    max_leaves=8,
)
_MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"]),
    st.sampled_from(["user", "assistant", [{"type": "text", "text": "a"}], [{"function": {"name": "f"}}]]) | _JSON,
)
_NAMES = st.sampled_from(
    sorted({*ChatCompletionBody.model_fields, *CompletionBody.model_fields, *REFUSALS, "tokens", "return_token_strs"})
)
_VALUES = (
    _JSON
    | st.sampled_from([MODEL, 0, 1, 2, -1, True, 0.5, "a", ["a"], [1, 2], {"1": 1}])
    | st.lists(_MESSAGE, max_size=3)
)


@settings(max_examples=600, deadline=None)
@given(
    endpoint=st.sampled_from(sorted(PARSERS)),
    fields=st.dictionaries(_NAMES | st.text(max_size=4), _VALUES, max_size=5) | _JSON,
    is_complete=st.booleans(),
)
@example(CHAT, {"messages": [{"role": "user", "content": {"str": 1}}]}, True)
@example(CHAT, {"stop": {"str": ""}, "stop_token_ids": [[]]}, True)
def test_arbitrary_json_is_accepted_or_refused(endpoint: str, fields: Any, is_complete: bool):
    whole = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "prompt": "a", "tokens": [1]}
    needed = {CHAT: "messages", COMPLETIONS: "prompt", TOKENIZE: "prompt", DETOKENIZE: "tokens"}[endpoint]
    if is_complete and isinstance(fields, dict):
        fields = {"model": MODEL, needed: whole[needed]} | fields
    try:
        accept(endpoint, json.dumps(fields).encode())
    except ServeError as error:
        assert error.status in (400, 404)
        assert set(orjson.loads(body(error))["error"]) == {"message", "type", "param", "code"}


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(raw: bytes):
    for endpoint in PARSERS:
        with pytest.raises(InvalidRequest):
            accept(endpoint, raw)
