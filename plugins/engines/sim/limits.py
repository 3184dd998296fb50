"""The sizes of a simulated engine: from the engine's configuration and, where there is one, the model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtserve.plugins.api import EngineConfig

DEFAULT_NUM_BLOCKS = 2048
DEFAULT_MAX_NUM_TOKENS = 512


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The sizes a scheduler keeps to; max_seq_len <= num_blocks * block_size, so that any sequence fits alone."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_tokens: int
    max_seq_len: int
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the simulation takes from a model folder; None where the folder does not say."""

    vocab_size: int | None = None
    max_seq_len: int | None = None


def read_model_sizes(model_path: str) -> ModelSizes:
    """From config.json in the folder; nothing if there is none, as a simulation needs no model.

    Raises ValueError if the file is there and is not a JSON object.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        return ModelSizes()
    config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not a JSON object: use a Hugging Face model folder.")
    # Models with more than text keep the language model's sizes one level down.
    text_config = config.get("text_config")
    sizes: dict[str, Any] = {**config, **text_config} if isinstance(text_config, dict) else config
    return ModelSizes(sizes.get("vocab_size"), sizes.get("max_position_embeddings"))


def scheduler_limits(config: EngineConfig, model: ModelSizes) -> SchedulerLimits:
    """Raises ValueError if a size is below 1 or the longest sequence does not fit into the cache."""
    num_blocks = DEFAULT_NUM_BLOCKS if config.num_blocks is None else config.num_blocks
    sizes = {
        "block_size": config.block_size,
        "num_blocks": num_blocks,
        "max_num_seqs": config.max_num_seqs,
        "max_num_tokens": DEFAULT_MAX_NUM_TOKENS if config.max_num_tokens is None else config.max_num_tokens,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    capacity = num_blocks * config.block_size
    max_seq_len = min(capacity, model.max_seq_len or capacity) if config.max_seq_len is None else config.max_seq_len
    if not 2 <= max_seq_len <= capacity:
        raise ValueError(
            f"max_seq_len is {max_seq_len}; it must be at least 2 and at most the {capacity} tokens of the KV cache:"
            " lower it or raise num_blocks."
        )
    return SchedulerLimits(**sizes, max_seq_len=max_seq_len, enable_prefix_caching=config.enable_prefix_caching)
