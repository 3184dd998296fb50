"""From settings to the arguments of `tensorrt_llm.LLM`, in two parts: what trtserve says, and what the user says.

Pure but for reading the user's file. The worker gives both to TensorRT-LLM's own `update_llm_args_with_extra_dict`,
whose semantics `LLMArguments.merged` repeats for checks and for people.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtserve.plugins.api import EngineConfig, PlanRefused, Role
from trtserve.plugins.engines.tensorrt_llm.facts import DEFAULT_MAX_NUM_TOKENS, Facts
from trtserve.plugins.engines.tensorrt_llm.old_names import in_new_names
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.engines.tensorrt_llm.rules import check_role
from trtserve.plugins.engines.tensorrt_llm.unknown_names import unknown_names

_OURS: Mapping[str, str] = {
    "model": "MODEL says it",
    "tokenizer": "the server tokenizes",
    "num_postprocess_workers": "the server makes text of tokens",
    "postprocess_tokenizer_dir": "the server makes text of tokens",
    "mpi_session": "it is no setting",
    "_mpi_session": "it is no setting",
}
"""What the user's arguments must not say; left out with a note."""


class ArgumentsError(PlanRefused):
    """The arguments contradict each other or are unknown; the text has a line for each problem."""


@dataclass(frozen=True, slots=True)
class LLMArguments:
    """`base` and `extra` are fresh and the receiver's own."""

    base: dict[str, Any]  # from trtserve's settings
    extra: dict[str, Any]  # from the user's file and llm_args, in 1.2's names; comes before base
    notes: tuple[str, ...]  # warnings to log

    def merged(self) -> dict[str, Any]:
        """What TensorRT-LLM makes of both: shallow, but kv_cache_config name by name."""
        return merged(self.base, self.extra)


def llm_arguments(config: EngineConfig, options: TensorRTLLMOptions) -> LLMArguments:
    """Raises ArgumentsError naming every problem."""
    base = _base(config, options)
    extra, notes = _extra(options)
    _follow(base, extra)
    _complete_blocks(base, extra)
    problems, unknown_notes = unknown_names(extra)
    rule_problems, rule_notes = check_role(Facts(merged(base, extra), config, options))
    problems += rule_problems
    if problems:
        raise ArgumentsError("\n".join(problems))
    return LLMArguments(base, extra, (*notes, *unknown_notes, *rule_notes))


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """By TensorRT-LLM's rules; a copy."""
    together = copy.deepcopy({**below, **above})
    caches = [side["kv_cache_config"] for side in (below, above) if isinstance(side.get("kv_cache_config"), Mapping)]
    if len(caches) == 2:
        together["kv_cache_config"] = copy.deepcopy({**caches[0], **caches[1]})
    return together


# ------------------------------------------------------------------ what trtserve says


def _base(config: EngineConfig, options: TensorRTLLMOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": config.model_path,
        # Guided decoding needs the vocabulary as text; nothing else does.
        "skip_tokenizer_init": options.guided_decoding_backend is None,
        "trust_remote_code": options.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "enable_attention_dp": options.enable_attention_dp,
        "max_batch_size": config.max_num_seqs,
        "max_num_tokens": DEFAULT_MAX_NUM_TOKENS if config.max_num_tokens is None else config.max_num_tokens,
        "enable_chunked_prefill": options.enable_chunked_prefill,
        "enable_iter_perf_stats": True,
        "kv_cache_config": _kv_cache(config, options),
    }
    if_given = {
        "max_seq_len": config.max_seq_len,
        "moe_expert_parallel_size": options.moe_expert_parallel_size,
        "gpus_per_node": options.gpus_per_node,
        "guided_decoding_backend": options.guided_decoding_backend,
    }
    arguments |= {name: value for name, value in if_given.items() if value is not None}
    if config.role is not Role.AGG:
        arguments["cache_transceiver_config"] = _transceiver(config, options)
    if config.role is Role.PREFILL:
        # Not supported on context workers up to 1.2.
        arguments["disable_overlap_scheduler"] = True
    return arguments


def _kv_cache(config: EngineConfig, options: TensorRTLLMOptions) -> dict[str, Any]:
    reuse = config.enable_prefix_caching
    cache: dict[str, Any] = {
        "tokens_per_block": config.block_size,
        "enable_block_reuse": reuse,
        # Events tell of reusable blocks only.
        "event_buffer_max_size": options.event_buffer_max_size if reuse else 0,
    }
    if options.kv_cache_free_gpu_memory_fraction is not None:
        cache["free_gpu_memory_fraction"] = options.kv_cache_free_gpu_memory_fraction
    if config.num_blocks is not None:
        cache["max_tokens"] = config.num_blocks * config.block_size
    if config.kv_cache_gib is not None:
        cache["max_gpu_total_bytes"] = int(config.kv_cache_gib * 2**30)
    return cache


def _transceiver(config: EngineConfig, options: TensorRTLLMOptions) -> dict[str, Any]:
    by_setting = "UCX" if config.transfer == "auto" else config.transfer.upper()
    transceiver: dict[str, Any] = {
        "backend": options.transceiver_backend or by_setting,
        "kv_transfer_timeout_ms": options.kv_transfer_timeout_ms,
    }
    if config.max_seq_len is not None:
        # Has to hold the longest prompt, in full blocks.
        transceiver["max_tokens_in_buffer"] = -(-config.max_seq_len // config.block_size) * config.block_size
    return transceiver


# ------------------------------------------------------------------ what the user says


def _extra(options: TensorRTLLMOptions) -> tuple[dict[str, Any], list[str]]:
    path = options.extra_llm_api_options
    from_file, file_notes = in_new_names({} if path is None else _read(path))
    inline, inline_notes = in_new_names(options.llm_args)
    extra = merged(from_file, inline)
    notes = [f"{path}: {note}" for note in file_notes] + [f"llm_args: {note}" for note in inline_notes]
    for name, why in _OURS.items():
        if name in extra:
            notes.append(f"{name}: {extra.pop(name)!r} is left out: {why}")
    return extra, notes


def _read(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentsError(f"extra_llm_api_options {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentsError(f"extra_llm_api_options {path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ArgumentsError(f"extra_llm_api_options {path}: holds a {type(content).__name__}, not arguments by name")
    return {str(name): value for name, value in content.items()}


def _complete_blocks(base: Mapping[str, Any], extra: dict[str, Any]) -> None:
    """A user's block replaces ours as a whole, inside of kv_cache_config too before some 1.2 or 1.3: without this a
    user's `dtype` would take our block size and memory fraction away, and a user's timeout the transfers."""
    for name in ("cache_transceiver_config", "kv_cache_config"):
        ours, theirs = base.get(name), extra.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            extra[name] = {**ours, **theirs}


def _follow(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Where our defaults depend on what the user says."""
    if extra.get("guided_decoding_backend") is not None:
        base["skip_tokenizer_init"] = False
    cache = extra.get("kv_cache_config")
    if isinstance(cache, Mapping) and not cache.get("enable_block_reuse", True):
        base["kv_cache_config"]["event_buffer_max_size"] = 0
