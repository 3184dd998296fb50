"""One step's work, packed for the model: all tokens of all sequences in one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtserve.plugins.engines.torch.attention import PagedAttention, PrefillChunk
from trtserve.plugins.engines.torch.block_copies import BlockCopies
from trtserve.plugins.engines.torch.decode_attention import DecodeGroup
from trtserve.plugins.engines.torch.decode_rows import DecodeRows
from trtserve.plugins.engines.torch.kv_store import KVStore
from trtserve.plugins.engines.torch.sequence import Sequence

_GROUP_SPLIT_BLOCKS = 64  # padding worth a second group: gathering this many blocks costs about a group's own calls


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The next `count` tokens of a sequence, whose blocks are allocated."""

    sequence: Sequence
    count: int

    @property
    def is_complete(self) -> bool:
        """Whether a token can be sampled after this step."""
        return self.count == self.sequence.num_pending


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Inputs of one forward pass. `sampled[i]` is the sequence whose next token comes from logits row i."""

    input_ids: Tensor  # int64[1, tokens]
    position_ids: Tensor  # int64[1, tokens]
    rows_to_keep: Tensor  # int64[max(1, len(sampled))], indices into tokens
    paged: PagedAttention
    sampled: list[Sequence]


def pack(
    work: list[Scheduled], store: KVStore, scratch: dict[str, Tensor], decode_rows: DecodeRows | None = None
) -> PackedBatch:
    """Lay out a step: single tokens first, in the order of their kept rows or longest context first, then the chunks
    in their order."""
    singles = [item.sequence for item in work if item.count == 1]
    kept = None if decode_rows is None else decode_rows.place(singles)
    if kept is None:
        singles.sort(key=lambda sequence: sequence.num_computed, reverse=True)
        groups, rows = _decode_groups(singles, store, scratch), None
    else:
        singles, groups, rows = kept.sequences, kept.groups, kept.update
    chunks = [item for item in work if item.count > 1]
    ordered = [Scheduled(sequence, 1) for sequence in singles] + chunks
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    keep: list[int] = []
    prefills: list[PrefillChunk] = []
    for item in ordered:
        if item.count > 1:
            prefills.append(_prefill_chunk(item, len(ids), store))
        _append_tokens(item, store.block_size, ids, positions, slots)
        if item.is_complete:
            keep.append(len(ids) - 1)
    device = store.device
    paged = PagedAttention(store, _to_device(slots, device), groups, prefills, rows)
    return PackedBatch(
        input_ids=_to_device(ids, device)[None],
        position_ids=_to_device(positions, device)[None],
        # a model cannot be asked for no logits at all; a row that nobody reads costs little beside its chunk
        rows_to_keep=_to_device(keep or [len(ids) - 1], device),
        paged=paged,
        sampled=[item.sequence for item in ordered if item.is_complete],
    )


def _append_tokens(item: Scheduled, block_size: int, ids: list[int], positions: list[int], slots: list[int]) -> None:
    sequence = item.sequence
    start, stop = sequence.num_computed, sequence.num_computed + item.count
    ids.extend(sequence.tokens[start:stop])
    positions.extend(range(start, stop))
    blocks = sequence.block_ids
    slots.extend(
        [blocks[position // block_size] * block_size + position % block_size for position in range(start, stop)]
    )


def _prefill_chunk(item: Scheduled, start: int, store: KVStore) -> PrefillChunk:
    total = item.sequence.num_computed + item.count
    blocks = item.sequence.block_ids[: _blocks_for(total, store.block_size)]
    return PrefillChunk(start, item.count, item.sequence.num_computed, _to_device(blocks, store.device))


def _decode_groups(singles: list[Sequence], store: KVStore, scratch: dict[str, Tensor]) -> list[DecodeGroup]:
    """Split rows, sorted by falling length, where padding the rest to the longest would cost more than a group."""
    groups: list[DecodeGroup] = []
    start = 0
    while start < len(singles):
        width = _blocks_for(singles[start].num_computed + 1, store.block_size)
        stop = start + 1
        while stop < len(singles):
            blocks = _blocks_for(singles[stop].num_computed + 1, store.block_size)
            if (width - blocks) * (len(singles) - stop) > _GROUP_SPLIT_BLOCKS:
                break
            stop += 1
        groups.append(_decode_group(singles[start:stop], start, width, store, scratch))
        start = stop
    return groups


def _decode_group(
    rows: list[Sequence], start: int, width: int, store: KVStore, scratch: dict[str, Tensor]
) -> DecodeGroup:
    table: list[int] = []
    for row in rows:
        own = row.block_ids[:width]
        table += own
        table += own[:1] * (width - len(own))  # hidden by the mask; its first block is certainly valid memory
    lengths = [row.num_computed + 1 for row in rows]
    is_run = len(rows) == 1 and table == list(range(table[0], table[0] + width))
    copies = BlockCopies(store, _to_device(table, store.device), width, table[0] if is_run else None, scratch)
    return DecodeGroup(start, _to_device(lengths, store.device), copies)


def _blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _to_device(numbers: list[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)
