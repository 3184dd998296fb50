"""Attention over KV blocks, in the form that transformers' models call.

A model calls `paged_attention` once a layer with the packed tokens of a whole step; the step's metadata arrives as
the forward argument `paged`. Rows with one new token (decodes) are gathered in groups and done as batched matrix
products; longer ones (prefill chunks) go through scaled dot-product attention one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trtserve.plugins.engines.torch.kv_store import KVStore

ATTENTION_NAME = "trtserve_paged"

_KEYS_ALIGNMENT = 8  # with AMX 511 keys take 1.4 times as long as 512


@dataclass(frozen=True, slots=True)
class AttentionTerms:
    """What a layer asks for beyond q, k and v. `sinks`: a logit for each query head, or None."""

    scaling: float
    window: int | None  # keys that a query sees, itself included; None: all
    softcap: float | None
    sinks: Tensor | None


class PagedStep(Protocol):
    """What a model's forward carries as `paged`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        """query: [heads, tokens, key_dim], key and value: [kv_heads, tokens, dim] -> [tokens, heads, value_dim]."""


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
class DecodeGroup:
    """Consecutive packed rows with one new token each, padded to the same number of blocks."""

    start: int  # first packed row
    lengths: Tensor  # int64[rows]: tokens that each row sees, its own included
    block_table: Tensor  # int64[rows * blocks_per_row]; past a row's end any valid block
    num_blocks: int  # for each row


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive packed tokens of one sequence, after `num_before` tokens that are in the cache."""

    start: int  # first packed row
    count: int
    num_before: int
    block_ids: Tensor  # int64: the blocks of all num_before + count tokens


@dataclass(slots=True)
class PagedAttention:
    """One step over the KV store: writes the new keys and values, then reads what each row may see."""

    store: KVStore
    slots: Tensor  # int64[tokens]: where each packed token's KV goes
    decodes: list[DecodeGroup]
    prefills: list[PrefillChunk]
    scratch: dict[str, Tensor]  # reused from step to step; owned by the engine
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
        keys, values = self.store.keys[layer], self.store.values[layer]
        keys.index_copy_(1, self.slots, key)
        values.index_copy_(1, self.slots, value)
        outputs = [self._decode(group, query, keys, values, terms) for group in self.decodes]
        outputs += [self._prefill(chunk, query, key, value, keys, values, terms) for chunk in self.prefills]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, group: DecodeGroup, query: Tensor, keys: Tensor, values: Tensor, terms: AttentionTerms) -> Tensor:
        rows, kv_heads, key_dim = len(group.lengths), keys.shape[0], keys.shape[2]
        heads_per_kv = query.shape[0] // kv_heads
        asked = query[:, group.start : group.start + rows].reshape(kv_heads, heads_per_kv, rows, key_dim)
        asked = asked.transpose(1, 2).reshape(kv_heads * rows, heads_per_kv, key_dim)
        seen_keys = self._gather("keys", keys, group)
        seen_values = self._gather("values", values, group)
        scores = torch.bmm(asked * terms.scaling, seen_keys.transpose(1, 2))
        mask = self._decode_mask(group, kv_heads, terms.window, scores.dtype)
        sinks = None
        if terms.sinks is not None:
            sinks = terms.sinks.view(kv_heads, 1, heads_per_kv, 1).expand(-1, rows, -1, -1).reshape(-1, heads_per_kv, 1)
        weights = _softmax(scores, mask, terms.softcap, sinks)
        mixed = torch.bmm(weights, seen_values).view(kv_heads, rows, heads_per_kv, -1)
        return mixed.transpose(0, 1).reshape(rows, query.shape[0], -1)

    def _gather(self, name: str, stored: Tensor, group: DecodeGroup) -> Tensor:
        """[kv_heads * rows, blocks_per_row * block_size, dim] of a group, in a buffer that the next call reuses."""
        kv_heads, _, dim = stored.shape
        shape = (kv_heads, len(group.block_table), self.store.block_size * dim)
        needed = math.prod(shape)
        buffer = self.scratch.get(name)
        if buffer is None or buffer.numel() < needed:
            buffer = self.scratch[name] = torch.empty(needed, dtype=stored.dtype, device=stored.device)
        gathered = buffer[:needed].view(shape)
        by_block = stored.view(kv_heads, self.store.num_blocks, -1)
        torch.index_select(by_block, 1, group.block_table, out=gathered)
        return gathered.view(kv_heads * len(group.lengths), -1, dim)

    def _decode_mask(self, group: DecodeGroup, kv_heads: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """[kv_heads * rows, 1, keys]: 0 where a row may look, -inf elsewhere; made once a step."""
        name = ("decode", group.start, kv_heads, window, dtype)
        if name not in self.masks:
            index = torch.arange(group.num_blocks * self.store.block_size, device=self.store.device)[None]
            hidden = index >= group.lengths[:, None]
            if window is not None:
                hidden |= index < group.lengths[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.store.device).masked_fill_(hidden, -math.inf)
            self.masks[name] = mask.repeat(kv_heads, 1)[:, None]
        return self.masks[name]

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
        weights = _softmax(scores, mask, terms.softcap, sinks)
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


def _softmax(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights of scores [..., queries, keys] in their dtype. Consumes `scores`."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.add_(mask)
    if sinks is None:
        return torch.softmax(scores, -1)
    # the sink takes part in the denominator and then carries no value
    with_sink = torch.cat([scores, sinks.to(scores.dtype)], -1)
    return torch.softmax(with_sink, -1, dtype=torch.float32)[..., :-1].to(scores.dtype)
