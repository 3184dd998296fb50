"""Arguments as TensorRT-LLM 0.19 to 1.1 named them, in the names of 1.2; each renaming leaves a note.

Source: the fields' history in the reference of `fields.py`; NVIDIA Dynamo's examples of 2025 use the old names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_MOVED: Mapping[str, tuple[str, str]] = {
    "cuda_graph_batch_sizes": ("cuda_graph_config", "batch_sizes"),
    "cuda_graph_max_batch_size": ("cuda_graph_config", "max_batch_size"),
    "cuda_graph_padding_enabled": ("cuda_graph_config", "enable_padding"),
    "kv_cache_dtype": ("kv_cache_config", "dtype"),
    "free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "kv_cache_free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "moe_backend": ("moe_config", "backend"),
    "moe_max_num_tokens": ("moe_config", "max_num_tokens"),
    "moe_load_balancer": ("moe_config", "load_balancer"),
}

_RENAMED: Mapping[str, str] = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "cp_size": "context_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "autotuner_enabled": "enable_autotuner",
}

_DROPPED: Mapping[str, str] = {
    "disagg_cluster": "trtserve needs no service discovery",
    "build_config": "it belongs to the TensorRT backend",
    "backend": "the PyTorch backend is the only one here",
}

_SPECULATIVE_RENAMED: Mapping[str, str] = {
    "speculative_model_dir": "speculative_model",
    "pytorch_weights_path": "speculative_model",
    "pytorch_eagle_weights_path": "speculative_model",
    "prompt_lookup_num_tokens": "max_draft_len",
    "BEGIN_THINKING_PHASE_TOKEN": "begin_thinking_phase_token",
    "END_THINKING_PHASE_TOKEN": "end_thinking_phase_token",
}

_MOE_BACKENDS = frozenset({"AUTO", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "VANILLA", "TRITON"})
_TRANSCEIVER_BACKENDS = frozenset({"default", "ucx", "nixl", "mpi", "mooncake"})


def in_new_names(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments in 1.2's names, and a note for each change. A new name that is given too keeps its value. `given`
    is not changed."""
    arguments = copy.deepcopy(dict(given))
    notes: list[str] = []
    _flatten(arguments, notes)
    _overlap(arguments, notes)
    _cuda_graphs(arguments, notes)
    _sampler(arguments, notes)
    for old, new in _RENAMED.items():
        if old in arguments:
            arguments.setdefault(new, arguments.pop(old))
            notes.append(f"{old} is {new} now")
    for old, (parent, child) in _MOVED.items():
        if old in arguments:
            _move(arguments, old, parent, child)
            notes.append(f"{old} is {parent}.{child} now")
    for name, why in _DROPPED.items():
        if name in arguments:
            value = arguments.pop(name)
            if (name, value) != ("backend", "pytorch"):
                notes.append(f"{name} is left out: {why}")
    _speculation(arguments, notes)
    _spellings(arguments)
    return arguments, notes


def _flatten(arguments: dict[str, Any], notes: list[str]) -> None:
    inner = arguments.get("pytorch_backend_config")
    if isinstance(inner, Mapping):
        del arguments["pytorch_backend_config"]
        for name, value in inner.items():
            arguments.setdefault(name, value)
        notes.append("what pytorch_backend_config held is at the top level now")


def _overlap(arguments: dict[str, Any], notes: list[str]) -> None:
    if "enable_overlap_scheduler" in arguments:
        arguments.setdefault("disable_overlap_scheduler", not arguments.pop("enable_overlap_scheduler"))
        notes.append("enable_overlap_scheduler is disable_overlap_scheduler now, with the opposite value")


def _cuda_graphs(arguments: dict[str, Any], notes: list[str]) -> None:
    """Graphs were off unless asked for and are on by default now: false has to become null, true an object."""
    if "use_cuda_graph" not in arguments:
        return
    if arguments.pop("use_cuda_graph"):
        arguments.setdefault("cuda_graph_config", {})
        notes.append("use_cuda_graph: true is cuda_graph_config: {} now")
        return
    for old in ("cuda_graph_batch_sizes", "cuda_graph_max_batch_size", "cuda_graph_padding_enabled"):
        arguments.pop(old, None)
    arguments.setdefault("cuda_graph_config", None)
    notes.append("use_cuda_graph: false is cuda_graph_config: null now")


def _sampler(arguments: dict[str, Any], notes: list[str]) -> None:
    for old, sampler in (("enable_trtllm_sampler", "TRTLLMSampler"), ("use_torch_sampler", "TorchSampler")):
        if old in arguments:
            if arguments.pop(old):
                arguments.setdefault("sampler_type", sampler)
            notes.append(f"{old} is sampler_type: {sampler} now")


def _move(arguments: dict[str, Any], old: str, parent: str, child: str) -> None:
    value = arguments.pop(old)
    inner = arguments.get(parent)
    if inner is None:
        inner = arguments[parent] = {}
    if isinstance(inner, dict):
        inner.setdefault(child, value)


def _speculation(arguments: dict[str, Any], notes: list[str]) -> None:
    config = arguments.get("speculative_config")
    if not isinstance(config, dict):
        return
    for old, new in _SPECULATIVE_RENAMED.items():
        if old in config:
            config.setdefault(new, config.pop(old))
            notes.append(f"speculative_config.{old} is {new} now")
    eagle = str(config.get("decoding_type")).lower() in ("eagle", "eagle3")
    if eagle and "num_nextn_predict_layers" in config:
        config.setdefault("max_draft_len", config.pop("num_nextn_predict_layers"))
        notes.append("speculative_config.num_nextn_predict_layers of Eagle is max_draft_len now")


def _spellings(arguments: dict[str, Any]) -> None:
    """Values whose case was free once."""
    moe = arguments.get("moe_config")
    if isinstance(moe, dict) and str(moe.get("backend")).upper() in _MOE_BACKENDS:
        moe["backend"] = moe["backend"].upper()
    transceiver = arguments.get("cache_transceiver_config")
    if isinstance(transceiver, dict) and str(transceiver.get("backend")).lower() in _TRANSCEIVER_BACKENDS:
        transceiver["backend"] = transceiver["backend"].upper()
