"""Good bodies, what they become, and the speed of the hot path."""

from __future__ import annotations

import timeit
from array import array
from typing import Any

import orjson
import pytest

from tests.server.api.bad_row import MODEL, VOCAB_SIZE
from trtserve.server.api.parameters import GenerationParams
from trtserve.server.api.schema import (
    RequestRules,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from trtserve.server.api.schema_bodies import ChatCompletionBody, CompletionBody
from trtserve.server.api.schema_refusals import QUIET, REFUSALS

RULES = RequestRules(served_models=(MODEL,), vocab_size=VOCAB_SIZE)
HELLO = {"role": "user", "content": "Hello"}


def chat(**fields: Any) -> GenerationParams:
    return parse_chat(orjson.dumps({"messages": [HELLO]} | fields), RULES)


def completion(**fields: Any) -> GenerationParams:
    return parse_completion(orjson.dumps({"prompt": "Hello"} | fields), RULES)


def test_a_silent_chat_request_leaves_everything_to_the_defaults():
    assert chat() == GenerationParams(model=MODEL, messages=(HELLO,))


def test_a_silent_completion_has_16_tokens_and_special_tokens():
    assert completion() == GenerationParams(model=MODEL, prompts=("Hello",), max_tokens=16, add_special_tokens=True)


def test_null_is_the_same_as_nothing():
    def nulls(fields: Any, required: str) -> dict[str, None]:
        return {name: None for name in [*fields, *REFUSALS, *QUIET] if name not in (required, "prompt", "messages")}

    assert chat(**nulls(ChatCompletionBody.model_fields, "messages")) == chat()
    assert completion(**nulls(CompletionBody.model_fields, "prompt")) == completion()


def test_every_parameter_arrives():
    params = chat(
        model=MODEL,
        n=2,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        max_tokens=9,
        max_completion_tokens=9,
        min_tokens=9,
        temperature=1,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        seed=-(2**63),
        repetition_penalty=1.5,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"0": -100, "999": 0.5},
        stop_token_ids=[0, 999],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=20,
        stop=["a", "b"],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        add_special_tokens=True,
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        continue_final_message=True,
        cache_salt="tenant",
    )
    assert params == GenerationParams(
        model=MODEL,
        n=2,
        stream=True,
        include_usage=True,
        continuous_usage_stats=True,
        max_tokens=9,
        min_tokens=9,
        temperature=1.0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        seed=-(2**63),
        repetition_penalty=1.5,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, -100.0), (999, 0.5)),
        stop_token_ids=(0, 999),
        ignore_eos=True,
        logprobs=20,
        stop=("a", "b"),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        add_special_tokens=True,
        messages=(HELLO,),
        chat_template_kwargs={"enable_thinking": False},
        add_generation_prompt=False,
        continue_final_message=True,
        cache_salt="tenant",
    )


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], (array("i", [1, 2]),)),
        ([[1, 2], [0, 999]], (array("i", [1, 2]), array("i", [0, 999]))),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: tuple[Any, ...]):
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_logprobs_of_chat(fields: dict[str, Any], logprobs: int | None):
    assert chat(**fields).logprobs == logprobs


def test_logprobs_of_completions():
    assert [completion(logprobs=k).logprobs for k in (None, 0, 5)] == [None, 0, 5]
    generous = RequestRules(served_models=(MODEL,), max_completion_logprobs=20)
    assert parse_completion(b'{"prompt": "x", "logprobs": 20}', generous).logprobs == 20


def test_both_off_values_of_top_k():
    assert [chat(top_k=value).top_k for value in (-1, 0, None)] == [0, 0, None]


@pytest.mark.parametrize(
    ("fields", "is_open"),
    [({}, True), ({"add_generation_prompt": False}, False), ({"continue_final_message": True}, False)],
)
def test_continuing_the_final_message_opens_no_answer(fields: dict[str, Any], is_open: bool):
    assert chat(**fields).add_generation_prompt is is_open


def test_messages_reach_the_template_in_plain_form():
    params = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": " "}}]},
            {"role": "tool", "content": "5", "tool_call_id": "1", "unknown": 1},
            {"role": "user", "content": "", "name": "Ada", "refusal": None},
        ]
    )
    assert params.messages == (
        {"role": "developer", "content": "a\nb"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
        {"role": "user", "content": "", "name": "Ada"},
    )


def test_reasoning_has_one_name_in_the_template():
    said = {"role": "assistant", "content": "a"}
    params = chat(
        messages=[
            said | {"reasoning": "because"},
            said | {"reasoning": "not this", "reasoning_content": "because"},
            said | {"reasoning": "because", "reasoning_content": None},
            said | {"reasoning": None},
        ]
    )
    because = said | {"reasoning_content": "because"}
    assert params.messages == (because, because, because, said)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "best_of": 1},
        {"num_beams": 1, "no_repeat_ngram_size": 0, "repeat_penalty": 1.0, "do_sample": True},
        {"priority": 0, "modalities": ["text"], "spaces_between_special_tokens": True},
        {"min_p": 0, "top_k": -1, "repetition_penalty": 1.0, "presence_penalty": 0},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    ],
)
def test_neutral_values_are_accepted_without_a_warning(fields: dict[str, Any]):
    assert chat(**fields).ignored == ()


def test_best_of_may_say_what_n_says():
    assert completion(best_of=3, n=3).n == 3


def test_unknown_fields_are_ignored_and_told():
    assert chat(zeta=1, alpha=[], nothing=None, user="me").ignored == ("alpha", "zeta")
    silent = RequestRules(served_models=(MODEL,), unknown_params="ignore")
    assert parse_completion(b'{"prompt": "x", "zeta": 1}', silent).ignored == ()


def test_tokenize_takes_text_or_messages():
    text = parse_tokenize(b'{"prompt": "", "return_token_strs": true}', RULES)
    assert (text.text, text.messages, text.add_special_tokens, text.return_token_strs) == ("", (), True, True)
    talk = parse_tokenize(orjson.dumps({"messages": [HELLO], "add_generation_prompt": False}), RULES)
    assert (talk.text, talk.messages, talk.add_special_tokens) == (None, (HELLO,), False)
    assert not talk.add_generation_prompt


def test_detokenize_takes_token_ids():
    assert parse_detokenize(b'{"tokens": [0, 999]}', RULES).tokens == array("i", [0, 999])
    assert parse_detokenize(b'{"tokens": []}', RULES).tokens == array("i")


def test_a_usual_chat_body_is_cheap():
    raw = orjson.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "system", "content": "Be helpful."}, {"role": "user", "content": "Tell me a story."}],
            "temperature": 0.7,
            "max_tokens": 100,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    best_us = min(timeit.repeat(lambda: parse_chat(raw, RULES), number=500, repeat=10)) / 500 * 1e6
    # The budget is 25 us; the rest is for slow and busy machines.
    assert best_us < 150
