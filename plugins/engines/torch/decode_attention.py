"""Attention for sequences that decode: one new token each, all rows of a group in a few batched products.

On a CPU each of a step's many small operations costs ten microseconds or more, since the weights that are read between
them leave nothing in the caches. So what the layers of a step share (views, masks) is made once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms, softmax
from trtserve.plugins.engines.torch.kv_store import KVStore

_FUSED_ROWS = 2  # up to so many rows torch's fused attention on the CPU is faster than two products and a softmax


@dataclass(frozen=True, slots=True)
class _Copy:
    """Where a group's blocks are copied to, as [kv_heads, blocks, numbers of a block] and as the products want it."""

    by_block: Tensor
    by_row: Tensor  # [kv_heads * rows, slots, dim]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Consecutive packed rows with one new token each, padded to the same number of blocks. For one step only."""

    start: int  # first packed row
    lengths: Tensor  # int64[rows]: tokens that each row sees, its own included
    block_table: Tensor  # int64[rows * blocks_per_row]; past a row's end any valid block
    num_blocks: int  # for each row
    first_block: int | None  # where the group is one row with consecutive blocks, which need no copy
    copies: dict[tuple[object, ...], _Copy] = field(default_factory=dict)
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def attend(
        self, store: KVStore, layer: int, query: Tensor, terms: AttentionTerms, scratch: dict[str, Tensor]
    ) -> Tensor:
        """query: [heads, tokens of the step, key_dim] -> [rows, heads, value_dim]."""
        shape, rows = store.layers[layer], len(self.lengths)
        asked = query if rows == query.shape[1] else query[:, self.start : self.start + rows]
        asked = asked.reshape(shape.kv_heads, -1, rows, shape.key_dim).transpose(1, 2)
        read = partial(self._read, store, scratch)
        is_plain = terms.softcap is None and terms.sinks is None
        if is_plain and rows <= _FUSED_ROWS and store.device.type == "cpu":
            return self._fused(asked, read("keys", store.keys[layer]), read("values", store.values[layer]), terms)
        # values are copied after the scores are done: until then a cache holds the keys
        weights = self._weights(asked, read("keys", store.keys[layer]), terms)
        mixed = torch.bmm(weights, read("values", store.values[layer])).view(shape.kv_heads, rows, -1, shape.value_dim)
        return mixed.transpose(0, 1).reshape(rows, query.shape[0], shape.value_dim)

    def _fused(self, asked: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:
        """asked: [kv_heads, rows, heads of one kv head, key_dim], here and below."""
        kv_heads, rows, _, key_dim = asked.shape
        mixed = F.scaled_dot_product_attention(
            asked.transpose(0, 1),
            keys.view(kv_heads, rows, -1, key_dim).transpose(0, 1),
            values.view(kv_heads, rows, -1, values.shape[2]).transpose(0, 1),
            attn_mask=self._mask(keys.shape[1], 1, terms.window, asked.dtype)[:, None],
            scale=terms.scaling,
        )
        return mixed.flatten(1, 2)

    def _weights(self, asked: Tensor, keys: Tensor, terms: AttentionTerms) -> Tensor:
        """[kv_heads * rows, heads of one kv head, slots]."""
        kv_heads, rows, heads_per_kv, _ = asked.shape
        query = asked.reshape(kv_heads * rows, heads_per_kv, -1).transpose(1, 2)
        mask = self._mask(keys.shape[1], kv_heads, terms.window, asked.dtype)
        if terms.softcap is None and terms.sinks is None:
            # keys on the left: oneDNN takes that side as it lies, and copies the other
            scores = torch.baddbmm(mask.transpose(1, 2), keys, query, alpha=terms.scaling)
            return torch.softmax(scores.transpose(1, 2), -1)
        sinks = None
        if terms.sinks is not None:
            sinks = terms.sinks.view(kv_heads, 1, heads_per_kv, 1).expand(-1, rows, -1, -1).flatten(0, 1)
        scores = torch.bmm(keys, query * terms.scaling).transpose(1, 2)
        return softmax(scores, mask, terms.softcap, sinks)

    def _read(self, store: KVStore, scratch: dict[str, Tensor], name: str, stored: Tensor) -> Tensor:
        """[kv_heads * rows, slots, dim] of the group, which the next call with this name may write over."""
        if self.first_block is not None:
            start = self.first_block * store.block_size
            return stored[:, start : start + self.num_blocks * store.block_size]
        key = (name, stored.shape)
        copy = self.copies.get(key)
        if copy is None:
            copy = self.copies[key] = self._make_copy(store, scratch, name, stored)
        by_block = stored.view(stored.shape[0], store.num_blocks, -1)
        torch.index_select(by_block, 1, self.block_table, out=copy.by_block)
        return copy.by_row

    def _make_copy(self, store: KVStore, scratch: dict[str, Tensor], name: str, stored: Tensor) -> _Copy:
        kv_heads, _, dim = stored.shape
        needed = kv_heads * len(self.block_table) * store.block_size * dim
        buffer = scratch.get(name)
        if buffer is None or buffer.numel() < needed:
            buffer = scratch[name] = torch.empty(needed, dtype=stored.dtype, device=stored.device)
        by_block = buffer[:needed].view(kv_heads, len(self.block_table), -1)
        return _Copy(by_block, by_block.view(kv_heads * len(self.lengths), -1, dim))

    def _mask(self, slots: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[repeats * rows, 1, slots]: 0 where a row may look, -inf elsewhere."""
        name = (repeats, window, dtype)
        mask = self.masks.get(name)
        if mask is None:
            device = self.lengths.device
            index = torch.arange(slots, device=device)[None]
            hidden = index >= self.lengths[:, None]
            if window is not None:
                hidden |= index < self.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            mask = self.masks[name] = mask.repeat(repeats, 1)[:, None]
        return mask
