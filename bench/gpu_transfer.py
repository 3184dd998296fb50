"""How fast a KV transfer reads another process's GPU memory, as a ratio to a device-to-device copy in the same run.

    python bench/gpu_transfer.py --transfer cupy_ipc [--devices 0] [--devices 0,1]

`--devices READER,SOURCE`: two GPUs, where the reference is a plain copy between them. The two sides take turns; each
row has the medians. Contents are checked once a shape.
"""

from __future__ import annotations

import argparse
import importlib
import select
import time
from array import array
from statistics import median

import cupy
import msgspec
import numpy as np
from transfer import BLOCK_BYTES, DEADLINE_S, POOL, POOL_BYTES, SHAPES, Ids, Shape

from trtserve.plugins.api import WorkerId
from trtserve.plugins.conformance.transfer_case import Deployment, TransferCase
from trtserve.plugins.conformance.transfer_site import block_bytes_of
from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer_api import (
    BlockCopies,
    KVTransfer,
    MemoryKind,
    Peer,
    PeerInfo,
    ReadPlan,
    Region,
    TransferConfig,
    TransferOutcome,
)


class Reader:
    """This process as a worker that reads from the process `source`, whose pool is on its own device."""

    def __init__(self, deployment: Deployment, name: str, device: int) -> None:
        source = deployment.site("source", [POOL])
        self.source_seed = source.seed
        cuda_driver.use(f"cuda:{device}")
        self._transfer: KVTransfer = importlib.import_module(deployment.case.plugin).make_transfer(name)
        self._transfer.open(TransferConfig(WorkerId("reader"), 1, deployment.runtime_dir, device=f"cuda:{device}"))
        self._buffer = self._transfer.allocate(POOL_BYTES) or cuda_driver.allocate(POOL_BYTES, f"cuda:{device}")
        region = Region(POOL.name, self._buffer.address, POOL.num_blocks, BLOCK_BYTES, BLOCK_BYTES, MemoryKind.CUDA)
        self._transfer.register(region)
        told = source.call("info")
        self.peer: Peer = self._transfer.import_peer(
            msgspec.convert(told["info"], PeerInfo), told["export"], DEADLINE_S
        )

    def read(self, shape: Shape, sources: Ids, targets: Ids) -> None:
        copies = BlockCopies(POOL.name, array("i", sources.tobytes()), array("i", targets.tobytes()))
        transfer_id = self._transfer.read_blocks(self.peer, ReadPlan([copies]), DEADLINE_S)
        while not (ended := self._transfer.poll()):
            descriptor = self._transfer.wakeup_fd()
            tick_s = min(self._transfer.tick_s() or DEADLINE_S, 0.0002)
            select.select([] if descriptor is None else [descriptor], [], [], tick_s)
        assert [(end.transfer_id, end.outcome) for end in ended] == [(transfer_id, TransferOutcome.DONE)], ended

    def check(self, sources: Ids, targets: Ids) -> None:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            got = cuda_driver.read(self._buffer.address + target * BLOCK_BYTES, BLOCK_BYTES)
            expected = block_bytes_of(self.source_seed, POOL.name, source, BLOCK_BYTES)
            assert got == expected, f"block {target} is not the source's block {source}"

    def close(self) -> None:
        self._transfer.close()


class DeviceCopy:
    """The reference: one contiguous copy within a device, or from one to the other."""

    def __init__(self, devices: list[int]) -> None:
        with cupy.cuda.Device(devices[-1]):
            self._source = cupy.ones(POOL_BYTES, cupy.uint8)
        self._device = cupy.cuda.Device(devices[0])
        with self._device:
            self._target = cupy.zeros(POOL_BYTES, cupy.uint8)

    def copy(self, shape: Shape, sources: Ids, targets: Ids) -> None:
        with self._device:
            cupy.cuda.runtime.memcpy(self._target.data.ptr, self._source.data.ptr, shape.num_bytes, 4)
            self._device.synchronize()


def measure(shape: Shape, reader: Reader, reference: DeviceCopy) -> tuple[float, float]:
    random = np.random.default_rng(3)
    took_s: dict[str, list[float]] = {"read": [], "copy": []}
    for number in range(shape.repeats(False) + 1):
        sources, targets = shape.ids(random), shape.ids(random)
        for name, side in (("read", reader.read), ("copy", reference.copy)):
            begun_s = time.perf_counter()
            side(shape, sources, targets)
            took_s[name].append(time.perf_counter() - begun_s)
        if number == 0:
            reader.check(sources, targets)
    return median(took_s["read"][1:]), median(took_s["copy"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transfer", required=True, help="cupy_ipc, ucx, nixl")
    parser.add_argument("--devices", default="0", help="one GPU, or reader and source")
    arguments = parser.parse_args()
    name, devices = arguments.transfer, [int(device) for device in arguments.devices.split(",")]
    case = TransferCase(f"trtserve.plugins.transfer.{name}", name, device=f"cuda:{devices[-1]}", deadline_s=60.0)
    with case.deployment() as deployment:
        reader, reference = Reader(deployment, name, devices[0]), DeviceCopy(devices)
        print(f"\n{name}, devices {devices}, lane {reader.peer.lane}\n\n| shape | ms | GB/s | copy GB/s | ratio |")
        print("|---|---|---|---|---|")
        for shape in SHAPES:
            read_s, copy_s = measure(shape, reader, reference)
            size = shape.num_bytes
            cells = (f"{read_s * 1e3:.3f}", f"{size / read_s / 1e9:.1f}", f"{size / copy_s / 1e9:.1f}")
            print(f"| {str(shape).strip()} | {' | '.join(cells)} | {copy_s / read_s:.2f} |", flush=True)
        reader.close()


if __name__ == "__main__":
    main()
