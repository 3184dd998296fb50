"""What crosses between a context phase and a generation phase, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import KVHandle, RequestRefused
from trtserve.plugins.engines.tensorrt_llm.hand_over import Descriptor, generation_keywords, handle_of

FIELDS = frozenset(Descriptor.__struct_fields__)
ids = st.integers(0, 2**64 - 1)
token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
left_behind = st.fixed_dictionaries(
    {"first_gen_tokens": token_ids, "ctx_request_id": ids, "opaque_state": st.binary(max_size=200)},
    optional={"draft_tokens": token_ids, "disagg_request_id": ids, "ctx_info_endpoint": st.text(max_size=9)},
)


def handle(content: bytes) -> KVHandle:
    return KVHandle(1, "", 0, 0, (), descriptor=content)


@given(left_behind, st.sets(st.sampled_from(sorted(FIELDS))))
def test_there_and_back(fields, known):
    params = SimpleNamespace(**fields, first_gen_logits=object(), multimodal_hashes=[[1]])
    kept = handle_of(params)
    assert 0 <= kept.lease_id < 2**63
    assert generation_keywords(kept, FIELDS) == {"request_type": "generation_only", **fields}
    only = generation_keywords(kept, known)
    assert only == {"request_type": "generation_only", **{name: fields[name] for name in fields if name in known}}
    for name in ("ctx_request_id", "opaque_state"):
        assert type(generation_keywords(kept, FIELDS)[name]) is type(fields[name])


@given(st.one_of(st.binary(max_size=60), st.recursive(st.none() | st.integers() | st.binary(), st.lists)
                 .map(lambda value: msgspec.msgpack.encode(value) if _fits(value) else b"")))  # fmt: skip
def test_garbage_is_refused(content):
    with pytest.raises(RequestRefused):
        generation_keywords(handle(content), FIELDS)


def _fits(value):
    return all(map(_fits, value)) if isinstance(value, list) else not isinstance(value, int) or abs(value) < 2**63


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"first_gen_tokens": []},
        {"first_gen_tokens": [-1]},
        {"first_gen_tokens": [2**31]},
        {"first_gen_tokens": [1], "ctx_request_id": -1},
        {"first_gen_tokens": [1], "ctx_request_id": 1.5},
        {"first_gen_tokens": [1], "opaque_state": 7},
        {"first_gen_tokens": [1], "draft_tokens": [1] * 5000},
    ],
)
def test_wrong_descriptors_are_refused(fields):
    with pytest.raises(RequestRefused):
        generation_keywords(handle(msgspec.msgpack.encode(fields)), FIELDS)


def test_a_descriptor_that_would_exhaust_the_stack_is_refused():
    with pytest.raises(RequestRefused):
        generation_keywords(handle(b"\x81\xa1c" + b"\x91" * 100_000), FIELDS)


@pytest.mark.parametrize(
    "fields",
    [
        {"first_gen_tokens": None},
        {"first_gen_tokens": [None]},
        {"first_gen_tokens": [1], "ctx_request_id": 2**64},
        {"first_gen_tokens": [1], "ctx_request_id": object()},
        {"first_gen_tokens": [1], "opaque_state": "text"},
    ],
)
def test_what_cannot_be_handed_on(fields):
    with pytest.raises(ValueError):
        handle_of(SimpleNamespace(**fields))
