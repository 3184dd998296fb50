"""Scattered blocks in one kernel launch: which block goes where as two index arrays, in the widest words that fit.

A launch costs some microseconds whatever it copies, so a copy for each of a thousand blocks of 64 KiB would cost more
than the copying. Long runs are left to the copy engines.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import gcd

from trtserve.plugins.transfer_api import BlockCopies, Region

LONG_RUN_BYTES = 1 << 20
"""Runs of this mean length go to the copy engines."""

_FEW_RUNS = 2  # copies that cost no more than the upload of index arrays

THREADS = 256
_WORDS = {16: "uint4", 8: "uint2", 4: "unsigned", 1: "char"}
_MAX_PARTS = 64  # thread blocks for one KV block
_WORDS_A_THREAD = 8

SOURCE = r"""
extern "C" __global__ void gather(
    const char* source, char* target, const int* source_ids, const int* target_ids,
    long long source_stride, long long target_stride, long long num_words)
{
    const WORD* from = (const WORD*)(source + source_ids[blockIdx.x] * source_stride);
    WORD* to = (WORD*)(target + target_ids[blockIdx.x] * target_stride);
    const long long step = (long long)gridDim.y * blockDim.x;
    for (long long word = (long long)blockIdx.y * blockDim.x + threadIdx.x; word < num_words; word += step)
        to[word] = from[word];
}
"""


@dataclass(frozen=True, slots=True)
class Gather:
    """One launch: block source_ids[i] from `source` on becomes block target_ids[i] from `target` on."""

    source: int
    target: int
    source_ids: array[int]
    target_ids: array[int]
    source_stride: int
    target_stride: int
    block_bytes: int

    @property
    def word_bytes(self) -> int:
        """The widest word that everything is a whole number of."""
        common = gcd(self.source, self.target, self.source_stride, self.target_stride, self.block_bytes)
        return next(size for size in _WORDS if common % size == 0)

    @property
    def word(self) -> str:
        return _WORDS[self.word_bytes]

    @property
    def grid(self) -> tuple[int, int]:
        """Thread blocks: one or more for each KV block."""
        words = self.block_bytes // self.word_bytes
        return len(self.source_ids), max(1, min(_MAX_PARTS, -(-words // (THREADS * _WORDS_A_THREAD))))


def gather_of(copies: BlockCopies, own: Region, peer: Region) -> Gather:
    """The kernel's arguments for one region of a plan."""
    return Gather(peer.address, own.address, copies.sources, copies.targets, peer.stride, own.stride, own.block_bytes)


def suits_copy_engines(copies: BlockCopies, own: Region, peer: Region) -> bool:
    """Whether its runs are few or long. Counted over whole arrays: a run by run look takes longer than the copying."""
    import numpy

    num_runs = len(copies.targets)
    if own.stride == peer.stride == own.block_bytes:
        sources, targets = (numpy.frombuffer(ids, numpy.int32) for ids in (copies.sources, copies.targets))
        num_runs -= int(numpy.count_nonzero((numpy.diff(sources) == 1) & (numpy.diff(targets) == 1)))
    return num_runs <= _FEW_RUNS or len(copies.targets) * own.block_bytes >= LONG_RUN_BYTES * num_runs
