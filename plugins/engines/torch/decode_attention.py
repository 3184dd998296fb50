"""Attention for sequences that decode: one new token each, all rows of a group at once.

On a CPU each of a step's many small operations costs ten microseconds or more, since the weights that are read between
them leave nothing in the caches. So what the layers of a step share (views, masks) is made once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms, softmax


class DecodeKV(Protocol):
    """The keys and values of a group's rows, all padded to the same number of slots with any finite numbers.

    What a call returns may be written over by the next call of the same method, never by one of the other.
    """

    def keys(self, layer: int) -> Tensor:
        """[rows, kv_heads, slots, key_dim]."""

    def values(self, layer: int) -> Tensor:
        """[rows, kv_heads, slots, value_dim]."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Consecutive packed rows with one new token each. For one step only."""

    start: int  # first packed row
    lengths: Tensor  # int64[rows]: tokens that each row sees, its own included
    kv: DecodeKV
    masks: dict[tuple[int, int | None, torch.dtype], Tensor] = field(default_factory=dict)
    fused_masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window, [rows, 1, 1, slots]

    def attend(self, layer: int, query: Tensor, terms: AttentionTerms) -> Tensor:
        """query: [heads, tokens of the step, key_dim] -> [rows, heads, value_dim]."""
        rows = self.lengths.shape[0]
        asked = query if rows == query.shape[1] else query[:, self.start : self.start + rows]
        keys, values = self.kv.keys(layer), self.kv.values(layer)
        is_plain = terms.softcap is None and terms.sinks is None and keys.shape[3] == values.shape[3]
        if is_plain and keys.device.type == "cpu":
            return self._fused(asked.transpose(0, 1).unsqueeze(2), keys, values, terms).squeeze(2)
        values = values.transpose(0, 1)  # of a kept row this, and the same of keys, becomes a copy
        mixed = torch.bmm(self._weights(asked, keys, terms), values.flatten(0, 1))
        mixed = mixed.view(values.shape[0], rows, -1, values.shape[3]).transpose(0, 1)
        return mixed.reshape(rows, query.shape[0], values.shape[3])

    def attend_joined(self, layer: int, query: Tensor, terms: AttentionTerms) -> Tensor:
        """query: [tokens of the step, heads, dim] -> [rows, heads * dim]. On the CPU, without soft cap and sinks."""
        rows = self.lengths.shape[0]
        asked = query if rows == query.shape[0] else query[self.start : self.start + rows]
        return self._fused(asked.unsqueeze(2), self.kv.keys(layer), self.kv.values(layer), terms).reshape(rows, -1)

    def _fused(self, asked: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:
        """asked: [rows, heads, 1, dim] -> the same shape."""
        mask = self.fused_masks.get(terms.window)
        if mask is None:
            mask = self._mask(keys.shape[2], 1, terms.window, asked.dtype)[:, None]
            self.fused_masks[terms.window] = mask
        # each query head by itself: torch's kernel is slower where the heads of one kv head are queries of one
        return F.scaled_dot_product_attention(
            asked, keys, values, attn_mask=mask, scale=terms.scaling, enable_gqa=asked.shape[1] != keys.shape[1]
        )

    def _weights(self, asked: Tensor, keys: Tensor, terms: AttentionTerms) -> Tensor:
        """[kv_heads * rows, heads of one kv head, slots]."""
        rows, kv_heads, slots, key_dim = keys.shape
        keys = keys.transpose(0, 1).flatten(0, 1)
        query = asked.reshape(kv_heads, -1, rows, key_dim).transpose(1, 2).reshape(kv_heads * rows, -1, key_dim)
        query = query.transpose(1, 2)
        mask = self._mask(slots, kv_heads, terms.window, asked.dtype)
        if terms.softcap is None and terms.sinks is None:
            # keys on the left: oneDNN takes that side as it lies, and copies the other
            scores = torch.baddbmm(mask.transpose(1, 2), keys, query, alpha=terms.scaling)
            return torch.softmax(scores.transpose(1, 2), -1)
        sinks = None
        if terms.sinks is not None:
            sinks = terms.sinks.view(kv_heads, 1, -1, 1).expand(-1, rows, -1, -1).flatten(0, 1)
        scores = torch.bmm(keys, query * terms.scaling).transpose(1, 2)
        return softmax(scores, mask, terms.softcap, sinks)

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
