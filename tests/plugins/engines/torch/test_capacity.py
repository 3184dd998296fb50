"""Sizes out of the configuration, the model and memory."""

from __future__ import annotations

import pytest

from trtserve.plugins.api import EngineConfig
from trtserve.plugins.engines.torch.capacity import plan_capacity
from trtserve.plugins.engines.torch.kv_store import KVStore


def test_blocks_come_from_the_memory_given(tiny_llama):
    block_bytes = KVStore.block_bytes(tiny_llama.layers, 16, tiny_llama.dtype)
    config = EngineConfig("", kv_cache_gib=10.5 * block_bytes / 2**30)
    assert plan_capacity(config, tiny_llama).num_blocks == 10


def test_a_number_of_blocks_wins_over_memory(tiny_llama):
    assert plan_capacity(EngineConfig("", num_blocks=7, kv_cache_gib=9.0), tiny_llama).num_blocks == 7


@pytest.mark.parametrize(
    ("config", "longest"),
    [({"num_blocks": 100}, 512), ({"num_blocks": 3}, 48), ({"num_blocks": 3, "max_seq_len": 20}, 20)],
)
def test_the_longest_sequence_is_bounded_by_model_cache_and_wish(config, longest, tiny_llama):
    assert plan_capacity(EngineConfig("", **config), tiny_llama).max_seq_len == longest


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_blocks": 3, "max_seq_len": 49}, "max_seq_len 49 is not between 2 and 48"),
        ({"num_blocks": 300, "max_seq_len": 513}, "max_seq_len 513 is not between 2 and 512"),
        ({"kv_cache_gib": 1e-9}, "raise kv_cache_gib"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_tokens": 0}, "max_num_tokens is 0"),
    ],
)
def test_contradictions_are_named(config, words, tiny_llama):
    with pytest.raises(ValueError, match=words):
        plan_capacity(EngineConfig("", **config), tiny_llama)
