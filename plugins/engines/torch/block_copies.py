"""KV blocks of sequences that decode, copied together in each layer of each step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trtserve.plugins.engines.torch.kv_store import KVStore


@dataclass(frozen=True, slots=True)
class _Copy:
    """Where blocks are copied to, as [kv_heads, blocks, numbers of a block] and as attention wants it."""

    by_block: Tensor
    by_row: Tensor  # [rows, kv_heads, slots, dim]


@dataclass(frozen=True, slots=True)
class BlockCopies:
    """A `DecodeKV` of rows with `num_blocks` blocks each. One row with consecutive blocks is read where it lies."""

    store: KVStore
    block_table: Tensor  # int64[rows * num_blocks]; past a row's end any valid block
    num_blocks: int  # for each row
    first_block: int | None  # of one row with consecutive blocks
    scratch: dict[str, Tensor]  # reused from step to step; owned by the engine
    copies: dict[tuple[object, ...], _Copy] = field(default_factory=dict)

    def keys(self, layer: int) -> Tensor:
        """[rows, kv_heads, slots, key_dim]."""
        return self._read("keys", self.store.keys[layer])

    def values(self, layer: int) -> Tensor:
        """[rows, kv_heads, slots, value_dim]."""
        return self._read("values", self.store.values[layer])

    def _read(self, name: str, stored: Tensor) -> Tensor:
        if self.first_block is not None:
            start = self.first_block * self.store.block_size
            return stored[None, :, start : start + self.num_blocks * self.store.block_size]
        key = (name, stored.shape)
        copy = self.copies.get(key)
        if copy is None:
            copy = self.copies[key] = self._make_copy(name, stored)
        by_block = stored.view(stored.shape[0], self.store.num_blocks, -1)
        torch.index_select(by_block, 1, self.block_table, out=copy.by_block)
        return copy.by_row

    def _make_copy(self, name: str, stored: Tensor) -> _Copy:
        kv_heads, _, dim = stored.shape
        rows = len(self.block_table) // self.num_blocks
        needed = kv_heads * len(self.block_table) * self.store.block_size * dim
        buffer = self.scratch.get(name)
        if buffer is None or buffer.numel() < needed:
            buffer = self.scratch[name] = torch.empty(needed, dtype=stored.dtype, device=stored.device)
        by_block = buffer[:needed].view(kv_heads, len(self.block_table), -1)
        return _Copy(by_block, by_block.view(kv_heads, rows, -1, dim).transpose(0, 1))
