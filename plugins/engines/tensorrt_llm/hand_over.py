"""TensorRT-LLM's disaggregated parameters, in and out of the descriptor of a `KVHandle`.

Only plain values cross: ints, bytes and lists of them, in msgpack, never a pickled object, as the two sides may be of
different versions. A receiver takes the fields that its own version has. What needs CUDA IPC handles or tensors
(multimodal embeddings, log probabilities and logits of the first token) stays behind.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, TypeAlias

import msgspec

from trtserve.plugins.api import KVHandle, RequestRefused, WorkerId

_MAX_TOKENS = 1024

_TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True):
    """What crosses of DisaggregatedParams, by its names there."""

    first_gen_tokens: Annotated[list[_TokenId], msgspec.Meta(min_length=1, max_length=_MAX_TOKENS)]
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None  # addresses and cache layout, for the receiver's transceiver
    draft_tokens: Annotated[list[_TokenId], msgspec.Meta(max_length=_MAX_TOKENS)] | None = None
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
    try:
        for name in ("first_gen_tokens", "draft_tokens"):
            if given[name] is not None:
                given[name] = [int(token_id) for token_id in given[name]]
        descriptor = msgspec.msgpack.encode(Descriptor(**given))
        _read(descriptor)  # checked here, where the engine can be blamed
    except (TypeError, ArithmeticError, RequestRefused) as error:
        raise ValueError(f"a context phase left what cannot be handed over: {error}") from error
    # Ids begin at 1 in every executor: together with the incarnation one is unique.
    number = given["disagg_request_id"] if given["disagg_request_id"] is not None else given["ctx_request_id"]
    return KVHandle((number or 0) % 2**63, WorkerId(""), 0, 0, (), descriptor=descriptor)


def context_keywords() -> dict[str, Any]:
    """For the prefill."""
    return {"request_type": "context_only"}


def generation_keywords(handle: KVHandle, known: Collection[str]) -> dict[str, Any]:
    """For the decode; known: the fields that the receiving version has. Raises RequestRefused for a descriptor that is
    not one of ours."""
    descriptor = _read(handle.descriptor)
    given = {
        name: value
        for name in Descriptor.__struct_fields__
        if name in known and (value := getattr(descriptor, name)) is not None
    }
    return {"request_type": "generation_only", **given}


def _read(content: bytes) -> Descriptor:
    try:
        descriptor = _decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(f"The KV that was handed over cannot be understood: {error}") from error
    for number in (descriptor.ctx_request_id, descriptor.disagg_request_id):
        if number is not None and not 0 <= number < 2**64:
            raise RequestRefused(f"The KV that was handed over cannot be understood: request {number}")
    return descriptor
