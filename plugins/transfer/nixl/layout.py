"""From regions to NIXL's descriptor lists, and from plans to pieces: index pairs into an own list and a peer's list.

One list holds all regions of a kind of memory, so that a piece can span regions. A block larger than a piece is cut
into parts, which are descriptors of their own; with `start` of a region:

    index of (part, block) = start + part * num_blocks + block
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtserve.plugins.transfer.nixl.agent import Indices, Rows
from trtserve.plugins.transfer.runs import PIECE_BYTES
from trtserve.plugins.transfer_api import BlockCopies, MemoryKind, ReadPlan, Region

PIECE_STRETCHES = 4096

Sizes = NDArray[np.int64]


class Piece(NamedTuple):
    """At most PIECE_BYTES: stretch `peer_ids[i]` of the peer's list becomes stretch `own_ids[i]` of the own one, the
    `sizes[i]` bytes from `addresses[i]`."""

    kind: MemoryKind
    own_ids: Indices
    peer_ids: Indices
    addresses: NDArray[np.int64]
    sizes: Sizes

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of each region are in a descriptor list. One kind of memory."""

    starts: Mapping[str, int]  # region → first index
    rows: Rows


def make_layout(regions: Iterable[Region], device: int) -> Layout:
    """device: index of the GPU that CUDA regions lie on; for host memory 0."""
    starts: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    index = 0
    for region in regions:
        starts[region.name] = index
        for offset, num_bytes in _parts(region.block_bytes):
            rows.append((region.address + offset, num_bytes, device, region.stride, region.num_blocks))
            index += region.num_blocks
    return Layout(starts, np.array(rows, np.uint64).reshape(-1, 5))


def cut_plan(
    plan: ReadPlan,
    own: Mapping[str, Region],
    peer: Mapping[str, Region],
    layouts: Mapping[MemoryKind, tuple[Layout, Layout]],
) -> Iterator[Piece]:
    """The pieces of a plan that `check_plan` let pass, in its order, one kind of memory after the other.

    layouts: the own one and the peer's, of all regions that both have.
    """
    for kind, (own_layout, peer_layout) in layouts.items():
        columns = [
            _stretches(copies, own[copies.region], peer[copies.region], own_layout, peer_layout)
            for copies in plan.copies
            if copies.targets and own[copies.region].kind is kind
        ]
        if columns:
            own_ids, peer_ids, addresses, sizes = (np.concatenate(column) for column in zip(*columns, strict=True))
            for begin, end in _cuts(sizes):
                yield Piece(
                    kind,
                    own_ids[begin:end].astype(np.int32),
                    peer_ids[begin:end].astype(np.int32),
                    addresses[begin:end],
                    sizes[begin:end],
                )


def stage_rows(address: int, sizes: Sizes) -> Rows:
    """Descriptors of that many bytes each, one after the other from an address of host memory."""
    rows = np.zeros((len(sizes), 5), np.uint64)
    rows[:, 0] = address + np.cumsum(sizes) - sizes
    rows[:, 1] = rows[:, 3] = sizes
    rows[:, 4] = 1
    return rows


def _parts(block_bytes: int) -> list[tuple[int, int]]:
    """(offset, bytes) of a block's parts."""
    return [(offset, min(PIECE_BYTES, block_bytes - offset)) for offset in range(0, block_bytes, PIECE_BYTES)]


def _stretches(
    copies: BlockCopies, own: Region, peer: Region, own_layout: Layout, peer_layout: Layout
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Sizes]:
    """Own ids, peer ids, own addresses and sizes; the parts of a block follow each other."""
    targets, sources = _column(copies.targets), _column(copies.sources)
    offsets, sizes = (np.array(column, np.int64) for column in zip(*_parts(own.block_bytes), strict=True))
    parts = np.arange(len(sizes), dtype=np.int64)
    return (
        (own_layout.starts[own.name] + targets + parts * own.num_blocks).ravel(),
        (peer_layout.starts[peer.name] + sources + parts * peer.num_blocks).ravel(),
        (own.address + targets * own.stride + offsets).ravel(),
        np.tile(sizes, len(targets)),
    )


def _column(block_ids: array[int]) -> NDArray[np.int64]:
    return np.array(block_ids, np.int64)[:, np.newaxis]


def _cuts(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """(begin, end) of the pieces."""
    ends = np.cumsum(sizes)
    begin = done_bytes = 0
    while begin < len(sizes):
        fitting = int(np.searchsorted(ends, done_bytes + PIECE_BYTES, side="right"))
        end = min(max(fitting, begin + 1), begin + PIECE_STRETCHES)
        yield begin, end
        begin, done_bytes = end, int(ends[end - 1])
