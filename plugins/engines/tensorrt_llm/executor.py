"""Builds the `LLM` from our settings and the user's, and says what it turned out to be."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtserve.plugins.api import EngineConfig
from trtserve.plugins.engines.tensorrt_llm.arguments import llm_arguments
from trtserve.plugins.engines.tensorrt_llm.library import Library, load_library
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions

logger = logging.getLogger(__name__)

_DEFAULT_TRANSFER_S = 60.0
_DEFAULT_BATCH_SIZE = 2048  # TensorRT-LLM's own where nothing is set

_BACKEND_VARIABLES = (
    ("TRTLLM_USE_NIXL_KVCACHE", "NIXL"),
    ("TRTLLM_USE_UCX_KVCACHE", "UCX"),
    ("TRTLLM_USE_MOONCAKE_KVCACHE", "MOONCAKE"),
    ("TRTLLM_USE_MPI_KVCACHE", "MPI"),
)
"""How TensorRT-LLM resolves the transceiver backend DEFAULT, in this order; NIXL where none is "1"."""


@dataclass(frozen=True, slots=True)
class Executor:
    """A loaded `LLM`, and its limits as it has filled them in. A rank has its own batch and KV cache."""

    llm: Any
    library: Library
    block_size: int
    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int
    max_prompt_tokens: int | None  # without chunked prefill no prompt is longer than a pass
    vocab_size: int
    num_ranks: int  # attention-DP ranks
    publishes_kv_events: bool
    caches_prefixes: bool
    has_stats: bool
    guides: bool  # guided decoding is on
    num_draft_tokens: int  # proposed in a decoding pass; 0: no speculation
    max_cache_tokens: int | None  # where the arguments bound the KV cache by tokens
    kv_fingerprint: str  # empty where it does not move KV
    transfer_s: float  # after which the transceiver gives a transfer up
    num_warm_up_requests: int

    def shutdown(self) -> None:
        """Errors are logged: the process is about to end."""
        try:
            self.llm.shutdown()
        except Exception:
            logger.exception("shutting TensorRT-LLM down failed")


def load_executor(config: EngineConfig, progress: Callable[[str], None]) -> Executor:
    """Takes minutes: imports TensorRT-LLM, loads the weights, captures CUDA graphs. Raises what any of it raises."""
    options = TensorRTLLMOptions.model_validate(dict(config.options))
    arguments = llm_arguments(config, options)
    for note in arguments.notes:
        logger.warning("%s", note)
    progress("importing TensorRT-LLM")
    library = load_library()
    logger.info("TensorRT-LLM %s", library.version)
    merged = library.update_arguments(deepcopy(dict(arguments.base)), deepcopy(dict(arguments.extra)))
    library.check_arguments(merged)
    progress("loading the model into TensorRT-LLM")
    return _describe(library.llm(**merged), library, config, options)


def _describe(llm: Any, library: Library, config: EngineConfig, options: TensorRTLLMOptions) -> Executor:
    args, model = llm.args, _model_config(Path(config.model_path))
    cache = args.kv_cache_config
    reuses = bool(_get(cache, "enable_block_reuse", True))
    transceiver = getattr(args, "cache_transceiver_config", None)
    moves_kv = transceiver is not None and _get(transceiver, "backend") is not None
    timeout_ms = _get(transceiver, "kv_transfer_timeout_ms") if moves_kv else None
    max_num_tokens = int(args.max_num_tokens or config.max_num_tokens or 8192)
    return Executor(
        llm=llm,
        library=library,
        block_size=int(_get(cache, "tokens_per_block", 32)),
        max_num_seqs=int(args.max_batch_size or _DEFAULT_BATCH_SIZE),
        max_num_tokens=max_num_tokens,
        max_seq_len=int(args.max_seq_len or model.get("max_position_embeddings") or max_num_tokens),
        max_prompt_tokens=None if getattr(args, "enable_chunked_prefill", False) else max_num_tokens,
        vocab_size=int(model.get("vocab_size") or 0),
        num_ranks=_num_ranks(args, library),
        publishes_kv_events=reuses and bool(_get(cache, "event_buffer_max_size", 0)),
        caches_prefixes=reuses,
        has_stats=bool(getattr(args, "enable_iter_perf_stats", False)),
        guides=getattr(args, "guided_decoding_backend", None) is not None,
        num_draft_tokens=_num_draft_tokens(args),
        max_cache_tokens=_get(cache, "max_tokens"),
        kv_fingerprint=_fingerprint(args, config) if moves_kv else "",
        transfer_s=timeout_ms / 1000 if timeout_ms else _DEFAULT_TRANSFER_S,
        num_warm_up_requests=options.warm_up_requests,
    )


def _num_ranks(args: Any, library: Library) -> int:
    """Attention-DP ranks, where a request can be sent to one of them."""
    can_choose = "scheduling_params" in library.generate_keywords and "attention_dp_rank" in library.scheduling_fields
    return int(args.tensor_parallel_size) if can_choose and getattr(args, "enable_attention_dp", False) else 1


def _get(owner: Any, name: str, default: Any = None) -> Any:
    """A field of a configuration, which is an object, or a mapping where a version did not convert it."""
    value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    return default if value is None else value


def _model_config(path: Path) -> dict[str, Any]:
    """config.json; that of the text part where a model has several."""
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    text = content.get("text_config")
    return content | text if isinstance(text, dict) else content


def _num_draft_tokens(args: Any) -> int:
    speculation = getattr(args, "speculative_config", None)
    if speculation is None:
        return 0
    return int(_get(speculation, "num_nextn_predict_layers") or _get(speculation, "max_draft_len") or 0)


def _fingerprint(args: Any, config: EngineConfig) -> str:
    """What both sides of a hand-over must have alike, for people to read. The model is compared at the hello."""
    cache, speculation = args.kv_cache_config, getattr(args, "speculative_config", None)
    backend = str(_get(args.cache_transceiver_config, "backend")).upper()
    if backend == "DEFAULT":
        backend = next((name for variable, name in _BACKEND_VARIABLES if os.environ.get(variable) == "1"), "NIXL")
    kind = "none" if speculation is None else f"{_get(speculation, 'decoding_type', '?')}:{_num_draft_tokens(args)}"
    return (
        f"tensorrt_llm, {backend}, KV {_get(cache, 'dtype', 'auto')} of {config.dtype}, "
        f"blocks of {_get(cache, 'tokens_per_block', 32)}, speculation {kind}"
    )
