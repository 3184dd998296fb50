"""How fast a KV transfer reads from another process, as a ratio to a plain memcpy of the same shape in the same run.

    python bench/transfer.py --transfer shm [--quick]

The sides take turns; each line has the medians. 1.00 is the speed of `numpy.copyto` between two arrays of this process:
of one stretch of memory, or block by block for scattered blocks of 64 KiB. Contents are checked once a shape. Over the
lane cma the third side is the system call behind it, bare: what the kernel's cross-memory attach gives on this machine,
which no transfer over it can pass. Exits 1 when a ratio misses its goal. Ratios carry over between machines far better
than speeds do; still, run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import select
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import msgspec
import numpy as np

from trtserve.plugins.api import WorkerId
from trtserve.plugins.conformance.transfer_case import Deployment, Layout, TransferCase
from trtserve.plugins.conformance.transfer_site import block_bytes_of
from trtserve.plugins.transfer_api import (
    BlockCopies,
    KVTransfer,
    Peer,
    PeerInfo,
    ReadPlan,
    Region,
    TransferConfig,
    TransferOutcome,
)

BLOCK_BYTES = 64 << 10
POOL = Layout("pool", 8192, BLOCK_BYTES, BLOCK_BYTES)
POOL_BYTES = POOL.num_blocks * BLOCK_BYTES
DEADLINE_S = 30.0
GOAL_FROM_BYTES = 16 << 20
GOALS = {"shm": (0.9, 0.55), "ucx": (0.8, 0.6), "nixl": (0.8, 0.65)}  # contiguous, scattered

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]
Side: TypeAlias = "Callable[[Shape, Ids, Ids], None]"


@dataclass(frozen=True, slots=True)
class Shape:
    num_bytes: int
    is_scattered: bool

    @property
    def num_blocks(self) -> int:
        return self.num_bytes // BLOCK_BYTES

    def repeats(self, is_quick: bool) -> int:
        repeats = 200 if self.num_bytes <= 1 << 20 else 30 if self.num_bytes <= 16 << 20 else 9
        return max(3, repeats // 3) if is_quick else repeats

    def ids(self, random: np.random.Generator) -> Ids:
        if self.is_scattered:
            return random.permutation(POOL.num_blocks)[: self.num_blocks].astype(np.int32)
        start = random.integers(POOL.num_blocks - self.num_blocks + 1)
        return np.arange(start, start + self.num_blocks, dtype=np.int32)

    def __str__(self) -> str:
        size = f"{self.num_bytes >> 10} KiB" if self.num_bytes < 1 << 20 else f"{self.num_bytes >> 20} MiB"
        return f"{size:>8} " + ("as scattered 64 KiB blocks" if self.is_scattered else "contiguous")


SHAPES = [Shape(size << 10, False) for size in (64, 1 << 10, 16 << 10, 256 << 10)] + [
    Shape(size << 20, True) for size in (1, 16, 256)
]


class Memcpy:
    """The reference: two pools of plain memory in this process."""

    def __init__(self) -> None:
        self._source, self._target = np.ones(POOL_BYTES, np.uint8), np.zeros(POOL_BYTES, np.uint8)
        self._target[:] = 2  # every page is there before anything is measured

    def copy(self, shape: Shape, sources: Ids, targets: Ids) -> None:
        if not shape.is_scattered:
            source, target = sources[0] * BLOCK_BYTES, targets[0] * BLOCK_BYTES
            np.copyto(self._target[target : target + shape.num_bytes], self._source[source : source + shape.num_bytes])
            return
        source_blocks, target_blocks = self._source.reshape(-1, BLOCK_BYTES), self._target.reshape(-1, BLOCK_BYTES)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            np.copyto(target_blocks[target], source_blocks[source])


class Reader:
    """This process as a worker that reads from the process `source`."""

    def __init__(self, deployment: Deployment, name: str) -> None:
        source = deployment.site("source", [POOL])
        self.source_seed = source.seed
        self._transfer: KVTransfer = importlib.import_module(deployment.case.plugin).make_transfer(name)
        self._transfer.open(TransferConfig(WorkerId("reader"), 1, deployment.runtime_dir))
        buffer = self._transfer.allocate(POOL_BYTES)
        self.pool = np.zeros(POOL_BYTES, np.uint8) if buffer is None else np.frombuffer(buffer.view, np.uint8)
        self.pool[:] = 0
        self._transfer.register(Region(*POOL[:1], self.pool.ctypes.data, *POOL[1:]))
        told = source.call("info")
        info = msgspec.convert(told["info"], PeerInfo)
        self.peer: Peer = self._transfer.import_peer(info, told["export"], DEADLINE_S)

    def read(self, shape: Shape, sources: Ids, targets: Ids) -> None:
        copies = BlockCopies(POOL.name, array("i", sources.tobytes()), array("i", targets.tobytes()))
        transfer_id = self._transfer.read_blocks(self.peer, ReadPlan([copies]), DEADLINE_S)
        while not (ended := self._transfer.poll()):
            descriptor = self._transfer.wakeup_fd()
            select.select([] if descriptor is None else [descriptor], [], [], self._transfer.tick_s() or DEADLINE_S)
        assert [(end.transfer_id, end.outcome) for end in ended] == [(transfer_id, TransferOutcome.DONE)], ended

    def check(self, sources: Ids, targets: Ids) -> None:
        blocks = self.pool.reshape(-1, BLOCK_BYTES)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            expected = block_bytes_of(self.source_seed, POOL.name, source, BLOCK_BYTES)
            assert blocks[target].tobytes() == expected, f"block {target} is not the source's block {source}"

    def close(self) -> None:
        self._transfer.close()


class _Stretch(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


class CrossMemory:
    """process_vm_readv from the source's pool into memory of this process, up to 1,024 blocks a call."""

    def __init__(self, reader: Reader) -> None:
        self._pid = reader.peer.info.pid
        self._source: int = reader.peer.regions[POOL.name].address  # type: ignore[attr-defined]
        self._target = np.zeros(POOL_BYTES, np.uint8)
        self._target[:] = 2
        self._read = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self._read.restype = ctypes.c_ssize_t

    def copy(self, shape: Shape, sources: Ids, targets: Ids) -> None:
        if not shape.is_scattered:
            sources, targets, size = sources[:1], targets[:1], shape.num_bytes
        else:
            size = BLOCK_BYTES
        for begin in range(0, len(sources), 1024):
            theirs = [
                _Stretch(self._source + int(block) * BLOCK_BYTES, size) for block in sources[begin : begin + 1024]
            ]
            own = self._target.ctypes.data
            ours = [_Stretch(own + int(block) * BLOCK_BYTES, size) for block in targets[begin : begin + 1024]]
            arrays = [(_Stretch * len(each))(*each) for each in (ours, theirs)]
            count = ctypes.c_ulong(len(ours))
            copied = self._read(self._pid, arrays[0], count, arrays[1], count, ctypes.c_ulong(0))
            assert copied == size * len(ours), f"process_vm_readv copied {copied} bytes"


def measure(shape: Shape, sides: dict[str, Side], reader: Reader, is_quick: bool) -> dict[str, float]:
    """Median seconds of each side."""
    random = np.random.default_rng(3)
    took_s: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(shape.repeats(is_quick) + 1):
        sources, targets = shape.ids(random), shape.ids(random)
        # Who goes second is more likely to be interrupted on a busy machine.
        for name in sorted(sides, reverse=number % 2 == 0):
            took_s[name].append(timed(sides[name], shape, sources, targets))
        if number == 0:
            reader.check(sources, targets)
    return {name: median(times[1:]) for name, times in took_s.items()}


def timed(copy: Side, shape: Shape, sources: Ids, targets: Ids) -> float:
    begun_s = time.perf_counter()
    copy(shape, sources, targets)
    return time.perf_counter() - begun_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfer", required=True, help="shm, ucx, nixl")
    parser.add_argument("--quick", action="store_true", help="a third of the repeats")
    arguments = parser.parse_args()
    name = arguments.transfer
    case = TransferCase(f"trtserve.plugins.transfer.{name}", name, deadline_s=60.0)
    missed = 0
    with case.deployment() as deployment:
        reader = Reader(deployment, name)
        sides: dict[str, Side] = {"read": reader.read, "memcpy": Memcpy().copy}
        if reader.peer.lane == "cma":
            sides["bare"] = CrossMemory(reader).copy
        print(f"{name}, lane {reader.peer.lane}, probe {reader.peer.bandwidth_bytes_per_s / 1e9:.1f} GB/s")
        for shape in SHAPES:
            took_s = measure(shape, sides, reader, arguments.quick)
            read_s, memcpy_s = took_s["read"], took_s["memcpy"]
            goal = GOALS.get(name, (0.0, 0.0))[shape.is_scattered] if shape.num_bytes >= GOAL_FROM_BYTES else 0.0
            ratio = memcpy_s / read_s
            missed += ratio < goal
            print(
                f"{shape!s:38} {read_s * 1e3:9.3f} ms {shape.num_bytes / read_s / 1e9:7.2f} GB/s"
                f"   memcpy {shape.num_bytes / memcpy_s / 1e9:6.2f} GB/s   ratio {ratio:5.2f}"
                + (f"   goal {goal:.2f} {'missed' if ratio < goal else 'met'}" if goal else "")
                + (f"   bare cma {memcpy_s / took_s['bare']:.2f}" if "bare" in took_s else ""),
                flush=True,
            )
        reader.close()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
