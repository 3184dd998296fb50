"""How much the engine can hold: KV blocks, the longest sequence, sequences at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.model import Model

DEFAULT_MAX_NUM_TOKENS = 512

_GIB = 2**30
_CPU_KV_CACHE_GIB = 1.0
_CUDA_FREE_SHARE = 0.85  # of the memory left beside the weights; the rest is for activations


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limits that a configuration comes to with one model on one device."""

    num_blocks: int
    max_seq_len: int  # tokens, prompt and output
    max_num_seqs: int
    max_num_tokens: int  # in one pass


def plan_capacity(config: EngineConfig, model: Model) -> Capacity:
    """Limits from the configuration, the model and free memory; raises ValueError where they contradict."""
    max_num_tokens = DEFAULT_MAX_NUM_TOKENS if config.max_num_tokens is None else config.max_num_tokens
    sizes = {"block_size": config.block_size, "max_num_seqs": config.max_num_seqs, "max_num_tokens": max_num_tokens}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")
    num_blocks = config.num_blocks or _blocks_for_memory(config, model)
    room = num_blocks * config.block_size
    longest = min(model.max_position_embeddings, room)
    if config.max_seq_len is not None and not 2 <= config.max_seq_len <= longest:
        raise ValueError(
            f"max_seq_len {config.max_seq_len} is not between 2 and {longest}: the model takes "
            f"{model.max_position_embeddings} tokens and the KV cache {room}. Lower it, or give more KV blocks."
        )
    # every running sequence must get a token into each pass
    max_num_seqs = min(config.max_num_seqs, max_num_tokens)
    return Capacity(num_blocks, config.max_seq_len or longest, max_num_seqs, max_num_tokens)


def blocks_beside_rows(room: int, longest: int) -> int:
    """Blocks for the cache of a worker that moves KV, where `room` holds as many blocks and rows together.

    longest: blocks of the longest sequence. A worker takes rows for a quarter of the blocks, and for one longest
    sequence that fits the cache at least.
    """
    return max(min(room * 4 // 5, room - longest), (room - 1) // 2)


def _blocks_for_memory(config: EngineConfig, model: Model) -> int:
    block_bytes = KVStore.block_bytes(model.layers, config.block_size, model.dtype)
    if config.kv_cache_gib is not None:
        memory = int(config.kv_cache_gib * _GIB)
    elif model.device.type == "cuda":
        memory = int(torch.cuda.mem_get_info(model.device)[0] * _CUDA_FREE_SHARE)
        if config.role is not Role.AGG:
            longest = min(config.max_seq_len or model.max_position_embeddings, model.max_position_embeddings)
            memory = block_bytes * blocks_beside_rows(memory // block_bytes, longest // config.block_size + 1)
    else:
        memory = int(_CPU_KV_CACHE_GIB * _GIB)
    if memory < block_bytes:
        raise ValueError(
            f"a KV cache of {memory} bytes has no room for one block of {block_bytes}: raise kv_cache_gib, "
            "or lower block_size"
        )
    return memory // block_bytes
