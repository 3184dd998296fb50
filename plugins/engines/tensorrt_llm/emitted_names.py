"""Every name that trtserve gives to TensorRT-LLM or reads from it, gathered for `check_api`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm.arguments import LLMArguments, llm_arguments
from trtserve.plugins.engines.tensorrt_llm.hand_over import DISAGGREGATED_KEYWORDS
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.engines.tensorrt_llm.sampling import SAMPLING_KEYWORDS
from trtserve.settings.catalog import profiles
from trtserve.settings.roles import for_role
from trtserve.settings.schema import Settings

ROLES: Mapping[str, tuple[Role, ...]] = {"agg": (Role.AGG,), "disagg": (Role.PREFILL, Role.DECODE)}

GIVEN: Mapping[str, frozenset[str]] = {
    "SamplingParams": SAMPLING_KEYWORDS,
    "DisaggregatedParams": frozenset({"request_type", "first_gen_tokens", "ctx_request_id", "opaque_state"}),
    "GuidedDecodingParams": frozenset({"json", "json_object", "regex", "grammar"}),
    "SchedulingParams": frozenset({"attention_dp_rank", "attention_dp_relax"}),
    "LLM.generate_async": frozenset({"inputs", "sampling_params", "streaming", "disaggregated_params"}),
}
"""Keywords that every version must have, by class or method."""

GIVEN_IF_THERE: Mapping[str, frozenset[str]] = {
    "DisaggregatedParams": DISAGGREGATED_KEYWORDS,
    "LLM.generate_async": frozenset({"scheduling_params", "cache_salt"}),
}
"""Keywords that the engine looks for first."""

READ: Mapping[str, frozenset[str]] = {
    "GenerationResult": frozenset({"outputs", "finished", "abort", "aresult", "__aiter__", "__anext__"}),
    "CompletionOutput": frozenset({"token_ids", "logprobs", "finish_reason", "stop_reason", "disaggregated_params"}),
}
"""Attributes that are read of results."""

READ_IF_THERE: Mapping[str, frozenset[str]] = {"GenerationResult": frozenset({"cached_tokens", "decoding_iter"})}

LLM_METHODS = frozenset({"generate_async", "get_kv_cache_events_async", "get_stats_async", "shutdown"})

EVENT_TEXTS = frozenset(
    {
        *("event_id", "data", "window_size", "type", "created", "num_blocks_per_cache_level"),
        *("stored", "parent_hash", "blocks", "block_hash", "tokens", "token_id", "removed", "block_hashes"),
    }
)
"""Keys and types of KV events that are looked at."""


@dataclass(frozen=True, slots=True)
class ProfileArguments:
    """The arguments of `LLM` that one role of a shipped profile starts with."""

    name: str
    role: Role
    arguments: LLMArguments


def profile_arguments() -> Iterator[ProfileArguments]:
    """Of every shipped profile whose engine is this one."""
    for profile in profiles():
        settings = Settings.model_validate(yaml.safe_load(profile.text))
        if settings.engine == "tensorrt_llm":
            for role in ROLES[settings.mode]:
                yield ProfileArguments(profile.name, role, _arguments(settings, role))


def most_arguments() -> LLMArguments:
    """What the settings can say beyond what profiles do: every option that becomes an argument."""
    options = TensorRTLLMOptions(gpus_per_node=8, guided_decoding_backend="xgrammar", moe_expert_parallel_size=2,
                                 tensor_parallel_size=2, kv_cache_free_gpu_memory_fraction=0.5)  # fmt: skip
    config = EngineConfig("/model", Role.DECODE, block_size=32, num_blocks=512, max_seq_len=4096, transfer="nixl")
    return llm_arguments(config, options)


def _arguments(settings: Settings, role: Role) -> LLMArguments:
    own = for_role(settings, role)
    named = [field.name for field in fields(EngineConfig) if field.name in Settings.model_fields]
    given: dict[str, Any] = {name: getattr(own, name) for name in named}
    config = EngineConfig(model_path=own.model, role=role, options=own.engine_options, **given)
    return llm_arguments(config, TensorRTLLMOptions.model_validate(own.engine_options))
