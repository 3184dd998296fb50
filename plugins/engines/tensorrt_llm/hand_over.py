"""TensorRT-LLM's disaggregated parameters, in and out of the descriptor of a `KVHandle`.

Only plain values cross: ints, bytes and lists of them, in msgpack, never a pickled object, as the two sides may be of
different versions. A receiver takes the fields that its own version has. What needs CUDA IPC handles or tensors
(multimodal embeddings, log probabilities and logits of the first token) stays behind.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from trtserve.plugins.api import KVHandle, RequestRefused, WorkerId

_MAX_DRAFT_TOKENS = 1024


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True):
    """What crosses of DisaggregatedParams, by its names there."""

    first_gen_tokens: list[int]
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None  # addresses and cache layout, for the receiver's transceiver
    draft_tokens: list[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | list[str] | None = None


DISAGGREGATED_KEYWORDS = frozenset({"request_type", *Descriptor.__struct_fields__})
"""All that this engine ever gives DisaggregatedParams."""

_decoder = msgspec.msgpack.Decoder(Descriptor)


def handle_of(params: Any) -> KVHandle:
    """What a context phase left behind, for another worker. The server fills in worker and incarnation.

    Raises ValueError where it cannot be handed on.
    """
    given: dict[str, Any] = {name: getattr(params, name, None) for name in Descriptor.__struct_fields__}
    given["first_gen_tokens"] = [int(token_id) for token_id in given["first_gen_tokens"] or ()]
    if given["draft_tokens"] is not None:
        given["draft_tokens"] = [int(token_id) for token_id in given["draft_tokens"]]
    descriptor = msgspec.msgpack.encode(Descriptor(**given))
    _decoder.decode(descriptor)  # types are checked here, where the engine can be blamed
    # Ids begin at 1 in every executor: together with the incarnation one is unique.
    number = given["disagg_request_id"] if given["disagg_request_id"] is not None else given["ctx_request_id"]
    return KVHandle((number or 0) % 2**63, WorkerId(""), 0, 0, (), descriptor=descriptor)


def context_keywords() -> dict[str, Any]:
    """For the prefill."""
    return {"request_type": "context_only"}


def generation_keywords(handle: KVHandle, known: Collection[str]) -> dict[str, Any]:
    """For the decode; known: the fields that the receiving version has. Raises RequestRefused for a descriptor that is
    not one of ours."""
    try:
        descriptor = _decoder.decode(handle.descriptor)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestRefused(f"The KV that was handed over cannot be understood: {error}") from error
    if len(descriptor.draft_tokens or ()) > _MAX_DRAFT_TOKENS:
        raise RequestRefused(f"{len(descriptor.draft_tokens or ())} draft tokens were handed over")
    given = {
        name: value
        for name in Descriptor.__struct_fields__
        if name in known and (value := getattr(descriptor, name)) is not None
    }
    return {"request_type": "generation_only", **given}


def num_first_tokens(handle: KVHandle) -> int:
    """How many tokens the prefill generated. Raises RequestRefused as `generation_keywords`."""
    return len(generation_keywords(handle, ("first_gen_tokens",)).get("first_gen_tokens", ()))
