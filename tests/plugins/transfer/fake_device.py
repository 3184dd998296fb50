"""A GPU made of host memory, for what the cupy_ipc transfer does around CUDA's calls. `gather` runs the kernel's own
index arithmetic; copies happen at once, and events come when the test lets them."""

from __future__ import annotations

import ctypes
from itertools import count

from trtserve.plugins.transfer.cupy_ipc.device import DeviceError, Event

MEMORY: dict[bytes, int] = {}
"""Handle → address, of all devices: this process plays every worker."""

_numbers = count(1)


class FakeDevice:
    def __init__(self, index: int = 0, uuid: str = "gpu-a", visible: tuple[str, ...] = ("gpu-a", "gpu-b")) -> None:
        self.index, self.uuid, self.visible = index, uuid, visible
        self.events_come = True
        self.broken = ""  # what CUDA says to every call
        self.opened: list[int] = []
        self.launches: list[object] = []
        self.copied_runs = 0
        self.buffers: dict[int, ctypes.Array] = {}

    def allocate(self, num_bytes: int) -> int:
        self._check()
        buffer = ctypes.create_string_buffer(num_bytes)
        address = ctypes.addressof(buffer)
        self.buffers[address] = buffer
        return address

    def free(self, address: int) -> None:
        self._check()
        del self.buffers[address]

    def handle(self, address: int) -> bytes:
        handle = next(_numbers).to_bytes(64, "big")
        MEMORY[handle] = address
        return handle

    def open_handle(self, handle: bytes) -> int:
        self._check()
        if handle not in MEMORY:
            raise DeviceError("invalid resource handle")
        self.opened.append(MEMORY[handle])
        return MEMORY[handle]

    def close_handle(self, address: int) -> None:
        self._check()
        self.opened.remove(address)

    def why_apart(self, uuid: str) -> str | None:
        return None if uuid in self.visible else f"GPU {uuid} is not visible"

    def copy(self, runs) -> None:
        self._check()
        self.copied_runs += len(runs)
        for source, target, num_bytes in runs:
            ctypes.memmove(target, source, num_bytes)

    def gather(self, work) -> object:
        self._check()
        self.launches.append(work)
        word = work.word_bytes
        assert not any(number % word for number in (work.source, work.target, work.block_bytes))
        for source, target in zip(work.source_ids, work.target_ids, strict=True):
            ctypes.memmove(
                work.target + target * work.target_stride, work.source + source * work.source_stride, work.block_bytes
            )
        return work

    def mark(self) -> Event:
        self._check()
        return Event(next(_numbers))

    def has_come(self, event: Event) -> bool:
        self._check()
        return self.events_come

    def _check(self) -> None:
        if self.broken:
            raise DeviceError(self.broken)
