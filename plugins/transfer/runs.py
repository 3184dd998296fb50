"""From block ids to pieces of memory: merge adjacent blocks, then cut the work so that deadlines count in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region

PIECE_BYTES = 16 << 20
"""Most bytes to copy without a look at the deadline; some milliseconds."""

PIECE_RUNS = 1024
"""Most runs in a piece; also the most that one call of readv's kind takes (IOV_MAX of Linux)."""


class Run(NamedTuple):
    """`num_bytes` from address `source` at the peer to the own address `target`."""

    source: int
    target: int
    num_bytes: int


def bytes_of(runs: Iterable[Run]) -> int:
    """Of all runs together."""
    return sum(run.num_bytes for run in runs)


def merge_runs(plan: ReadPlan, own: Mapping[str, Region], peer: Mapping[str, Region]) -> list[Run]:
    """The runs of a plan that `check_plan` let pass, in its order. Blocks become one run where they follow each other
    on both sides without a gap."""
    runs: list[Run] = []
    for copies in plan.copies:
        runs += _runs_of(copies, own[copies.region], peer[copies.region])
    return runs


def cut_pieces(runs: Iterable[Run], max_bytes: int = PIECE_BYTES, max_runs: int = PIECE_RUNS) -> Iterator[list[Run]]:
    """The same work in pieces of at most max_bytes and max_runs; long runs are cut, lazily."""
    piece: list[Run] = []
    free = max_bytes
    for source, target, num_bytes in runs:
        while num_bytes:
            size = min(num_bytes, free)
            piece.append(Run(source, target, size))
            source, target, num_bytes, free = source + size, target + size, num_bytes - size, free - size
            if not free or len(piece) == max_runs:
                yield piece
                piece, free = [], max_bytes
    if piece:
        yield piece


def _runs_of(copies: BlockCopies, own: Region, peer: Region) -> Iterator[Run]:
    size = own.block_bytes
    has_gaps = own.stride > size or peer.stride > size
    start_source = start_target = length = 0
    for source, target in zip(copies.sources, copies.targets, strict=True):
        if length and source == start_source + length and target == start_target + length and not has_gaps:
            length += 1
            continue
        if length:
            yield _run(start_source, start_target, length, own, peer)
        start_source, start_target, length = source, target, 1
    if length:
        yield _run(start_source, start_target, length, own, peer)


def _run(source: int, target: int, length: int, own: Region, peer: Region) -> Run:
    return Run(peer.address + source * peer.stride, own.address + target * own.stride, length * own.block_bytes)
