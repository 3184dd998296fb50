"""A second copy of the KV of sequences that decode, kept from step to step on the CPU.

Blocks of a sequence lie anywhere in the KV store, and attention wants each sequence's keys in one piece. Copying all of
them together in each step costs as much as the linears of a large batch; here a sequence is copied once, into a row of
its own, and each step adds one token to it. The store stays the truth: a row is only ever filled from it, or with
what goes to it by the end of the same step, and whatever does not fit here is read from there.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trtserve.plugins.engines.torch.decode_attention import DecodeGroup
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.sequence import Sequence

_SPARE_TOKENS = 256  # room that a row has beyond the longest one's need, where memory allows
_SPLIT_TOKENS = 128  # padding worth a second group: attending to so many tokens costs about as much as a group's calls


@dataclass(frozen=True, slots=True)
class _Holder:
    """Whose KV a row holds. A sequence has the same list of blocks as long as it has blocks; after a preemption it
    gets another, and so another row."""

    block_ids: list[int]
    num_tokens: int  # whose KV is in the row once the step that was planned last has run


@dataclass(frozen=True, slots=True)
class RowsUpdate:
    """What one step changes: rows that are filled anew, and the next token of each."""

    store: KVStore
    kept: KVStore
    slots: Tensor  # int64[rows], in `kept`
    fresh: list[tuple[int, Tensor]]  # first block in `kept`, and int64[blocks] in the store

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: [kv_heads, tokens, dim], those of the rows first."""
        rows = self.slots.shape[0]
        if self.fresh:
            self._fill(layer)
        if key.shape[1] != rows:
            key, value = key[:, :rows], value[:, :rows]
        self.kept.keys[layer].index_copy_(1, self.slots, key)
        self.kept.values[layer].index_copy_(1, self.slots, value)

    def write_pair(self, layer: int, pair: Tensor) -> None:
        """pair: [2 * kv_heads, rows, dim], keys first, of a layer whose keys and values are of one dim."""
        if self.fresh:
            self._fill(layer)
        target: Any = self.kept.pairs[layer]
        target.index_copy_(1, self.slots, pair)

    def store_at(self, slots: Tensor) -> None:
        """Once all layers are written: put the rows' new tokens where they belong in the store, all layers at once."""
        for source, target in zip(self.kept.slabs, self.store.slabs, strict=True):
            target.index_copy_(1, slots, source.index_select(1, self.slots))

    def _fill(self, layer: int) -> None:
        self._fill_from(self.store.keys[layer], self.kept.keys[layer])
        self._fill_from(self.store.values[layer], self.kept.values[layer])

    def _fill_from(self, source: Tensor, target: Tensor) -> None:
        by_block = source.view(source.shape[0], self.store.num_blocks, -1)
        kept_by_block = target.view(target.shape[0], self.kept.num_blocks, -1)
        for first_block, block_ids in self.fresh:
            kept_by_block[:, first_block : first_block + len(block_ids)] = by_block.index_select(1, block_ids)


@dataclass(frozen=True, slots=True)
class DecodeRowsStep:
    """One step's rows: packed in the order of `sequences`, attended in `groups` after `update` was written."""

    sequences: list[Sequence]
    groups: list[DecodeGroup]
    update: RowsUpdate


@dataclass(frozen=True, slots=True)
class _RowsKV:
    """The `DecodeKV` of consecutive rows."""

    by_layer: list[tuple[Tensor, Tensor]]  # keys and values, [rows, kv_heads, slots, dim]

    def keys(self, layer: int) -> Tensor:
        return self.by_layer[layer][0]

    def values(self, layer: int) -> Tensor:
        return self.by_layer[layer][1]


class DecodeRows:
    """Rows of equal room, as many as the last step had sequences, in memory for `num_blocks` blocks.

    `place` once before each step, and `forget` a sequence whose KV went bad. Memory is taken as rows are written.
    """

    def __init__(self, store: KVStore, num_blocks: int) -> None:
        self._store = store
        self._kept = KVStore(store.layers, num_blocks, store.block_size, store.dtype, store.device, is_lazy=True)
        self._row_blocks = 0
        self._by_row: list[tuple[Tensor, Tensor]] = []  # of each layer, [rows there are, kv_heads, slots, dim]
        self._views: dict[tuple[int, int, int], _RowsKV] = {}  # of the step's groups: first and last row, slots
        self._last_views: dict[tuple[int, int, int], _RowsKV] = {}  # of the step before
        self._holders: list[_Holder] = []  # by row

    def place(self, sequences: Items[Sequence]) -> DecodeRowsStep | None:
        """Rows for sequences that compute one token each in this step; None where memory is too small for them."""
        if not sequences:
            return None
        longest = max(self._blocks_for(sequence.num_computed + 1) for sequence in sequences)
        if longest * len(sequences) > self._kept.num_blocks:
            return None
        if longest > self._row_blocks or len(sequences) * self._row_blocks > self._kept.num_blocks:
            spare = self._blocks_for(_SPARE_TOKENS)
            self._resize(min(longest + spare, self._kept.num_blocks // len(sequences)))
        self._last_views, self._views = self._views, {}
        ordered, fresh = self._assign(sequences)
        self._holders = [_Holder(sequence.block_ids, sequence.num_computed + 1) for sequence in ordered]
        return DecodeRowsStep(ordered, self._groups(ordered), self._update(ordered, fresh))

    def forget(self, block_ids: list[int]) -> None:
        """Clear the row of the sequence with this list of blocks, if it has one: numbers that are not finite would
        reach whoever gets the row next, through its unused slots."""
        for row, holder in enumerate(self._holders):
            if holder.block_ids is block_ids:
                self._kept.clear_blocks(range(row * self._row_blocks, (row + 1) * self._row_blocks))
                self._holders[row] = _Holder([], 0)

    def _assign(self, sequences: Items[Sequence]) -> tuple[list[Sequence], list[int]]:
        """Sequences by row, and which rows are to be filled. Whoever has one of the first rows keeps it."""
        row_of = {id(holder.block_ids): row for row, holder in enumerate(self._holders[: len(sequences)])}
        by_row: dict[int, Sequence] = {}
        others: list[Sequence] = []
        for sequence in sequences:
            row = row_of.get(id(sequence.block_ids))
            if row is None or self._holders[row].num_tokens != sequence.num_computed:
                others.append(sequence)
            else:
                by_row[row] = sequence
        others.sort(key=lambda sequence: sequence.num_computed, reverse=True)  # alike ones side by side
        fresh = [row for row in range(len(sequences)) if row not in by_row]
        by_row.update(zip(fresh, others, strict=True))
        return [by_row[row] for row in range(len(sequences))], fresh

    def _update(self, ordered: list[Sequence], fresh: list[int]) -> RowsUpdate:
        row_slots = self._row_blocks * self._store.block_size
        slots = [row * row_slots + sequence.num_computed for row, sequence in enumerate(ordered)]
        filled: list[tuple[int, Tensor]] = []
        for row in fresh:
            used = self._blocks_for(ordered[row].num_computed + 1)  # a prompt in prefill has more
            filled.append((row * self._row_blocks, self._index(ordered[row].block_ids[:used])))
        return RowsUpdate(self._store, self._kept, self._index(slots), filled)

    def _groups(self, ordered: list[Sequence]) -> list[DecodeGroup]:
        """Cut rows where padding a group to its longest would cost more than another group."""
        lengths = [sequence.num_computed + 1 for sequence in ordered]
        groups: list[DecodeGroup] = []
        start, widest, used = 0, lengths[0], lengths[0]
        for row, length in enumerate(lengths[1:], start=1):
            wider = max(widest, length)
            padding, before = wider * (row + 1 - start) - used - length, widest * (row - start) - used
            if padding - before > _SPLIT_TOKENS:
                groups.append(self._group(lengths, start, row))
                start, widest, used = row, length, length
            else:
                widest, used = wider, used + length
        return [*groups, self._group(lengths, start, len(lengths))]

    def _group(self, lengths: list[int], start: int, stop: int) -> DecodeGroup:
        own = lengths[start:stop]
        slots = self._blocks_for(max(own)) * self._store.block_size
        return DecodeGroup(start, self._index(own), self._view(start, stop, slots))

    def _view(self, start: int, stop: int, slots: int) -> _RowsKV:
        # most steps read what the one before did, and views of all layers take as long as some linears
        name = (start, stop, slots)
        view = self._last_views.get(name)
        if view is None:
            by_layer = [(keys[start:stop, :, :slots], values[start:stop, :, :slots]) for keys, values in self._by_row]
            view = _RowsKV(by_layer)
        self._views[name] = view
        return view

    def _resize(self, row_blocks: int) -> None:
        """Give rows another room; all lose what they hold."""
        self._row_blocks, self._holders, self._views = row_blocks, [], {}
        rows = self._kept.num_blocks // row_blocks
        row_slots = row_blocks * self._store.block_size

        def by_row(stored: Tensor) -> Tensor:
            return stored[:, : rows * row_slots].view(stored.shape[0], rows, row_slots, -1).transpose(0, 1)

        self._by_row = [(by_row(k), by_row(v)) for k, v in zip(self._kept.keys, self._kept.values, strict=True)]

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._store.block_size)

    def _index(self, numbers: Items[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._store.device)
