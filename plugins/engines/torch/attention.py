"""Attention over KV blocks, in the form that transformers' models call.

A model calls `paged_attention` once a layer with the packed tokens of a whole step; the step's metadata arrives as
the forward argument `paged`. Rows with one new token (decodes) go in groups through `decode_attention`; longer ones
(prefill chunks) go through scaled dot-product attention one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtserve.plugins.engines.torch.attention_terms import AttentionTerms, softmax, split_joined
from trtserve.plugins.engines.torch.decode_attention import DecodeGroup
from trtserve.plugins.engines.torch.decode_rows import RowsUpdate
from trtserve.plugins.engines.torch.kv_store import KVStore

ATTENTION_NAME = "trtserve_paged"

_KEYS_ALIGNMENT = 8  # with AMX 511 keys take 1.4 times as long as 512


class PagedStep(Protocol):
    """What a model's forward carries as `paged`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        """query: [heads, tokens, key_dim], key and value: [kv_heads, tokens, dim] -> [tokens, heads, value_dim]."""

    def attend_joined(self, layer: int, joined: Tensor, heads: int, terms: AttentionTerms) -> Tensor:
        """The same of [tokens, heads + 2 * kv_heads, dim]: queries, keys, values -> [tokens, heads * dim]."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: [1, heads, tokens, dim] in, [1, tokens, heads, value_dim] out.

    There is no mask (the name has no entry among transformers' masks), dropout or cache object to honour.
    """
    terms = AttentionTerms(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    layer: Any = module.layer_idx
    return paged.attend(layer, query[0], key[0], value[0], terms)[None], None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive packed tokens of one sequence, after `num_before` tokens that are in the cache."""

    start: int  # first packed row
    count: int
    num_before: int
    block_ids: Tensor  # int64: the blocks of all num_before + count tokens


@dataclass(slots=True)
class PagedAttention:
    """One step over the KV store: writes the new keys and values, then reads what each row may see.

    Call `finish` after the last layer: where all tokens are of kept rows, only then the store has them.
    """

    store: KVStore
    slots: Tensor  # int64[tokens]: where each packed token's KV goes
    decodes: list[DecodeGroup]
    prefills: list[PrefillChunk]
    rows: RowsUpdate | None  # for decodes that read kept rows
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        keys, values = self.store.keys[layer], self.store.values[layer]
        if self.rows is not None:
            self.rows.write(layer, key, value)
        if self.prefills or self.rows is None:
            keys.index_copy_(1, self.slots, key)
            values.index_copy_(1, self.slots, value)
        outputs = [group.attend(layer, query, terms) for group in self.decodes]
        outputs += [self._prefill(chunk, query, key, value, keys, values, terms) for chunk in self.prefills]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_joined(self, layer: int, joined: Tensor, heads: int, terms: AttentionTerms) -> Tensor:
        if self.prefills or self.rows is None or terms.softcap is not None or terms.sinks is not None:
            query, key, value = split_joined(joined, heads)
            return self.attend(layer, query, key, value, terms).reshape(len(joined), -1)
        self.rows.write_pair(layer, joined[:, heads:].transpose(0, 1))
        if len(self.decodes) == 1:
            return self.decodes[0].attend_joined(layer, joined[:, :heads], terms)
        return torch.cat([group.attend_joined(layer, joined[:, :heads], terms) for group in self.decodes])

    def finish(self) -> None:
        if self.rows is not None and not self.prefills:
            self.rows.store_at(self.slots)

    def _prefill(
        self,
        chunk: PrefillChunk,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        terms: AttentionTerms,
    ) -> Tensor:
        rows = slice(chunk.start, chunk.start + chunk.count)
        if chunk.num_before:
            key, value = self._read(keys, chunk), self._read(values, chunk)
        else:
            key, value = self._aligned(key[:, rows]), self._aligned(value[:, rows])
        if terms.softcap is not None or terms.sinks is not None:
            return self._prefill_general(chunk, query[:, rows], key, value, terms)
        is_causal = not chunk.num_before and (terms.window is None or chunk.count <= terms.window)
        mask = None if is_causal else self._prefill_mask(chunk, key.shape[1], terms.window, torch.bool)
        mixed = F.scaled_dot_product_attention(
            query[None, :, rows],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=is_causal,
            scale=terms.scaling,
            enable_gqa=query.shape[0] != key.shape[0],
        )
        return mixed[0].transpose(0, 1)

    def _prefill_general(
        self, chunk: PrefillChunk, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Soft cap and sinks, which no fused kernel of torch knows."""
        heads, kv_heads = query.shape[0], key.shape[0]
        asked = query.reshape(kv_heads, heads // kv_heads, chunk.count, -1) * terms.scaling
        scores = torch.matmul(asked, key[:, None].transpose(2, 3))
        mask = self._prefill_mask(chunk, key.shape[1], terms.window, scores.dtype)
        sinks = None if terms.sinks is None else terms.sinks.view(kv_heads, -1, 1, 1).expand(-1, -1, chunk.count, 1)
        weights = softmax(scores, mask, terms.softcap, sinks)
        return torch.matmul(weights, value[:, None]).reshape(heads, chunk.count, -1).transpose(0, 1)

    def _read(self, stored: Tensor, chunk: PrefillChunk) -> Tensor:
        """[kv_heads, slots of its blocks, dim] of one sequence, a copy; past its tokens any finite numbers."""
        by_block = stored.view(stored.shape[0], self.store.num_blocks, -1)
        return by_block.index_select(1, chunk.block_ids).view(stored.shape[0], -1, stored.shape[2])

    def _aligned(self, x: Tensor) -> Tensor:
        """[kv_heads, tokens, dim]; on the CPU filled up with zeros that no token sees, on CUDA as it is: there a
        causal kernel wants as many keys as queries."""
        missing = -x.shape[1] % _KEYS_ALIGNMENT if self.store.device.type == "cpu" else 0
        return F.pad(x, (0, 0, 0, missing)) if missing else x

    def _prefill_mask(self, chunk: PrefillChunk, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[count, num_keys]: what each new token sees, as booleans or as 0 and -inf; made once a step."""
        name = ("prefill", chunk.start, window, dtype)
        if name not in self.masks:
            device = self.store.device
            query_index = torch.arange(chunk.count, device=device)[:, None] + chunk.num_before
            key_index = torch.arange(num_keys, device=device)[None]
            visible = key_index <= query_index
            if window is not None:
                visible &= key_index > query_index - window
            if dtype is not torch.bool:
                visible = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)
            self.masks[name] = visible
        return self.masks[name]
