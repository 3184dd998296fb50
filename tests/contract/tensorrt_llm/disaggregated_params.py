"""`tensorrt_llm.disaggregated_params`: what prefill hands to decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .stand_in.features import versioned_fields
from .stand_in.violations import documented, violated

REQUEST_TYPES = ("context_only", "generation_only", "context_and_generation")


@dataclass(slots=True, kw_only=True)
@versioned_fields
class DisaggregatedParams:
    """1.2.1's fields as far as they are known; later ones come by WITH=DisaggregatedParams.NAME."""

    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    multimodal_embedding_handles: list[dict[str, Any]] | None = None
    multimodal_hashes: list[list[int]] | None = None
    mrope_position_ids_handle: dict[str, Any] | None = None
    mrope_position_deltas_handle: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.request_type is None:
            return
        self.request_type = self.request_type.lower()
        if self.request_type not in REQUEST_TYPES:
            raise documented(ValueError(f"Invalid request_type: {self.request_type}. Must be one of {REQUEST_TYPES}"))


def checked(params: DisaggregatedParams) -> DisaggregatedParams:
    """The library's binding takes exactly these types; a memoryview, a float or a text fails there, out of sight."""
    if not isinstance(params, DisaggregatedParams):
        raise violated(f"disaggregated_params is a {type(params).__name__}, not a DisaggregatedParams")
    if params.request_type not in REQUEST_TYPES:
        raise violated(f"disaggregated_params.request_type is {params.request_type!r}")
    if params.request_type == "generation_only":
        _check_types(params)
    elif any((params.first_gen_tokens, params.ctx_request_id, params.opaque_state, params.draft_tokens)):
        raise violated(f"a {params.request_type} request carries the result of a prefill")
    return params


def _check_types(params: DisaggregatedParams) -> None:
    if type(params.opaque_state) is not bytes:
        raise violated(f"opaque_state is {type(params.opaque_state).__name__}, not bytes")
    if type(params.ctx_request_id) is not int or not 0 <= params.ctx_request_id < 1 << 64:
        raise violated(f"ctx_request_id is {params.ctx_request_id!r}, not an unsigned 64-bit int")
    for name, required in (("first_gen_tokens", True), ("draft_tokens", False)):
        tokens = getattr(params, name)
        if tokens is None and not required:
            continue
        if type(tokens) is not list or (required and not tokens) or any(type(token) is not int for token in tokens):
            raise violated(f"{name} is {tokens!r}, not a list of ints")
