"""Sizes out of the configuration, the model and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import EngineConfig, EngineInfo, Role
from trtserve.plugins.engines.torch.capacity import blocks_beside_rows, plan_capacity
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.server.workers.kv_exchange import default_num_rows


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


def test_a_gpu_has_room_for_the_rows_of_a_worker_that_moves_kv(tiny_llama, monkeypatch):
    block_bytes = KVStore.block_bytes(tiny_llama.layers, 16, tiny_llama.dtype)
    model = replace(tiny_llama, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 * block_bytes, 2000 * block_bytes))
    assert plan_capacity(EngineConfig("", role=Role.AGG), model).num_blocks == 850
    assert plan_capacity(EngineConfig("", role=Role.DECODE), model).num_blocks == 680


@given(st.integers(3, 10**6), st.integers(1, 10**6), st.integers(1, 64))
def test_cache_and_rows_fit_into_the_room(room, longest_tokens, block_size):
    num_blocks = blocks_beside_rows(room, longest_tokens // block_size + 1)
    max_seq_len = min(longest_tokens, num_blocks * block_size)
    info = EngineInfo(block_size, num_blocks, 1, 1, max_seq_len, 1)
    assert num_blocks >= 1 and num_blocks + default_num_rows(info) <= room
    assert num_blocks >= (room - 1) // 2, "at most half goes to the rows"
