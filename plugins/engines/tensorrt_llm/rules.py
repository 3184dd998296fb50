"""Checks arguments before anything is loaded: of one role, and of the roles that hand KV to each other.

A rule looks at merged arguments (`LLMArguments.merged`) and gives a sentence or None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtserve.plugins.api import Role
from trtserve.plugins.engines.tensorrt_llm.facts import Facts, Rule, draft_length, inner, longest_prompt
from trtserve.plugins.engines.tensorrt_llm.fields import NESTED
from trtserve.plugins.engines.tensorrt_llm.notes import NOTES
from trtserve.plugins.engines.tensorrt_llm.refusals import REFUSALS

_SIZES = (
    *("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "gpus_per_node"),
    *("moe_expert_parallel_size", "moe_tensor_parallel_size", "moe_cluster_parallel_size"),
    *("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width"),
)

_INNER_NUMBERS = (
    *(("cuda_graph_config", "max_batch_size"), ("cache_transceiver_config", "max_tokens_in_buffer")),
    *(("moe_config", "max_num_tokens"), ("kv_cache_config", "event_buffer_max_size")),
    *(("speculative_config", "num_nextn_predict_layers"), ("speculative_config", "max_draft_len")),
)


def check_role(facts: Facts) -> tuple[list[str], list[str]]:
    """Problems and notes about one role's engine."""
    if problems := _wrong_types(facts):
        return problems, []
    return _said(REFUSALS, facts), _said(NOTES, facts)


def _said(rules: tuple[Rule, ...], facts: Facts) -> list[str]:
    return [text for rule in rules if (text := rule(facts)) is not None]


def _wrong_types(facts: Facts) -> list[str]:
    """Of what the rules calculate with, so they come second."""
    given = {name: value for name, value in facts.arguments.items() if value is not None}
    wrong = [
        f"{name}: {value!r} is not a whole number above 0"
        for name, value in given.items()
        if name in _SIZES and not _is_size(name, value)
    ]
    wrong += [
        f"{name}: {value!r} is no mapping of names to values"
        for name, value in given.items()
        if (name in NESTED or name == "speculative_config") and not isinstance(value, Mapping)
    ]
    if "kv_cache_config" not in given:
        wrong.append("kv_cache_config: null is no mapping of names to values")
    wrong += [
        f"{name}.{number}: {value!r} is not a whole number"
        for name, number in _INNER_NUMBERS
        if (value := facts.inner(name).get(number)) is not None and (type(value) is not int or value < 0)
    ]
    sizes = facts.inner("cuda_graph_config").get("batch_sizes")
    if sizes is not None and not (isinstance(sizes, list) and sizes and all(type(size) is int for size in sizes)):
        wrong.append(f"cuda_graph_config.batch_sizes: {sizes!r} is not a list of whole numbers")
    return wrong


def _is_size(name: str, value: object) -> bool:
    """-1 lets TensorRT-LLM choose how experts are divided."""
    return type(value) is int and (value > 0 or (value == -1 and name.startswith("moe_")))


def check_roles(roles: Mapping[Role, Mapping[str, Any]]) -> list[str]:
    """What does not go together between the merged arguments of prefill and decode engines."""
    if not {Role.PREFILL, Role.DECODE} <= roles.keys():
        return []
    prefill, decode = roles[Role.PREFILL], roles[Role.DECODE]
    problems = [
        f"{name}: {ours!r} for prefill and {theirs!r} for decode; both must have the same"
        for (name, ours), theirs in zip(_alike(prefill).items(), _alike(decode).values(), strict=True)
        if ours != theirs
    ]
    if _size(prefill, "pipeline_parallel_size") > 1 and _size(decode, "tensor_parallel_size") > 1:
        problems.append(
            "pipeline parallel prefill with tensor parallel decode hangs (#14020); use tensor parallel only"
        )
    buffer = inner(decode, "cache_transceiver_config").get("max_tokens_in_buffer")
    prompts = [longest for side in (prefill, decode) if (longest := longest_prompt(side)) is not None]
    if buffer is not None and prompts and buffer < min(prompts):
        problems.append(
            f"cache_transceiver_config.max_tokens_in_buffer {buffer} of decode does not hold the longest prompt, "
            f"{min(prompts)} tokens"
        )
    return problems


def _size(arguments: Mapping[str, Any], name: str) -> int:
    size = arguments.get(name)
    return size if isinstance(size, int) else 1


def _alike(arguments: Mapping[str, Any]) -> dict[str, Any]:
    cache, transceiver = inner(arguments, "kv_cache_config"), inner(arguments, "cache_transceiver_config")
    speculation = inner(arguments, "speculative_config")
    return {
        "dtype": arguments.get("dtype", "auto"),
        "kv_cache_config.dtype": cache.get("dtype", "auto"),
        "kv_cache_config.tokens_per_block": cache.get("tokens_per_block"),
        "cache_transceiver_config.backend": transceiver.get("backend"),
        "speculative_config.decoding_type": speculation.get("decoding_type"),
        "speculative_config draft length": draft_length(arguments),
    }
