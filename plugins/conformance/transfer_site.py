"""A worker's process in the conformance suite of transfers: holds regions of known bytes and obeys commands.

    python -m trtserve.plugins.conformance.transfer_site DESCRIPTOR

The descriptor is one end of a SOCK_SEQPACKET pair. A command is a msgpack list [name, argument, …]; the answer is
["done", result] or ["raised", class, text]. Between commands it polls the transfer as its descriptor and tick ask for,
as a worker does.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import mmap
import os
import select
import socket
import sys
import time
from array import array
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer_api import (
    BlockCopies,
    Buffer,
    Completion,
    KVTransfer,
    MemoryKind,
    Peer,
    PeerInfo,
    ReadPlan,
    Region,
    TransferConfig,
    TransferId,
)

MAX_MESSAGE_BYTES = 1 << 17
MAX_BLOCKS = 1 << 16  # of a region
GAP = b"\xa5"  # what lies between blocks

Placed = Mapping[str, Mapping[int, tuple[str, int]]]
"""Region → own block → (seed of the site that it came from, block there)."""


def block_bytes_of(seed: str, region: str, block_id: int, num_bytes: int) -> bytes:
    """What a site fills a block with: different bytes for every seed, region and block, at every place."""
    return _noise(f"{seed}/{region}", num_bytes + MAX_BLOCKS)[block_id : block_id + num_bytes]


@lru_cache(maxsize=16)
def _noise(seed: str, num_bytes: int) -> bytes:
    return hashlib.shake_128(seed.encode()).digest(num_bytes)


class Site:
    """The commands, as methods."""

    def __init__(self) -> None:
        self.transfer: KVTransfer | None = None
        self.completions: list[Completion] = []
        self._buffers: dict[str, tuple[Region, Buffer]] = {}
        self._foreign: list[Buffer] = []
        self._peers: list[Peer] = []
        self._baseline: dict[str, int] = {}

    def open(self, plugin: str, name: str, config: dict[str, Any], regions: list[list[Any]]) -> str:
        """Open the transfer, and register regions [name, num_blocks, block_bytes, stride] full of known bytes."""
        self._config, self._seed = TransferConfig(**config), f"{config['worker_id']}#{config['incarnation']}"
        transfer: KVTransfer | None = importlib.import_module(plugin).make_transfer(name)
        assert transfer is not None, f"{plugin} makes no transfer {name!r}"
        if self._config.device != "cpu":
            cuda_driver.use(self._config.device)
        transfer.open(self._config)
        self.transfer = transfer
        for row in regions:
            self._register(transfer, *row)
        return self._seed

    def info(self) -> dict[str, Any]:
        info = peer_info(self._config, cuda_driver.device_uuid(self._config.device))
        return {"info": msgspec.to_builtins(info), "export": self._open_one.export()}

    def caps(self) -> dict[str, Any]:
        caps = self._open_one.caps
        assert self._open_one.caps == caps, "caps are fixed for a transfer's lifetime"
        return {"maps_blocks": caps.maps_blocks, "owns_memory": caps.owns_memory, "across_nodes": caps.across_nodes,
                "memory": sorted(caps.memory), "name": self._open_one.name}  # fmt: skip

    def register(self, name: str, num_blocks: int, block_bytes: int, stride: int, is_foreign: bool) -> None:
        """One more region; foreign: in memory that the transfer did not give."""
        if not is_foreign:
            self._register(self._open_one, name, num_blocks, block_bytes, stride)
            return
        buffer = self._foreign_buffer(num_blocks * stride)
        self._foreign.append(buffer)
        self._open_one.register(Region(name, buffer.address, num_blocks, block_bytes, stride, buffer.kind))

    def unreachable(self, info: dict[str, Any]) -> str | None:
        return self._open_one.unreachable(msgspec.convert(info, PeerInfo))

    def import_peer(self, info: dict[str, Any], export: bytes, deadline_s: float) -> dict[str, Any]:
        peer = self._open_one.import_peer(msgspec.convert(info, PeerInfo), export, deadline_s)
        self._peers.append(peer)
        return {"number": len(self._peers) - 1, "lane": peer.lane, "bandwidth": peer.bandwidth_bytes_per_s}

    def read(self, number: int, copies: list[list[Any]], deadline_s: float, then: str = "") -> dict[str, Any]:
        """Begin a read of [region, sources, targets], and `then` at once "cancel" it, "drop" the peer or "close"."""
        transfer, peer = self._open_one, self._peers[number]
        plan = ReadPlan([BlockCopies(name, array("i", s), array("i", t)) for name, s, t in copies])
        transfer_id = transfer.read_blocks(peer, plan, deadline_s)
        cancelled = str(transfer.cancel(transfer_id)) if then == "cancel" else ""
        if then == "drop":
            transfer.drop_peer(peer)
        if then == "close":
            self.close()
        return {"id": transfer_id, "cancelled": cancelled}

    def cancel(self, transfer_id: int) -> str:
        return str(self._open_one.cancel(TransferId(transfer_id)))

    def wait(self, transfer_id: int, timeout_s: float) -> dict[str, Any] | None:
        """The completion of a read, None if it did not come in time."""
        until_s = time.monotonic() + timeout_s
        while True:
            self.poll()
            for completion in self.completions:
                if completion.transfer_id == transfer_id:
                    return {**msgspec.to_builtins(completion)}
            if (left_s := until_s - time.monotonic()) <= 0:
                return None
            select.select(self.wakeups(), [], [], min(left_s, self.tick_s()))

    def count(self, transfer_id: int) -> int:
        """How many completions a read has had."""
        return sum(completion.transfer_id == transfer_id for completion in self.completions)

    def map(self, number: int, region: str, block_ids: list[int]) -> dict[str, Any] | None:
        views = self._open_one.map_blocks(self._peers[number], region, block_ids)
        if views is None:
            return None
        digests = [hashlib.sha256(view).hexdigest() for view in views]
        return {"digests": digests, "readonly": all(view.readonly for view in views)}

    def drop(self, number: int) -> None:
        self._open_one.drop_peer(self._peers[number])

    def problems(self, placed: Placed) -> list[str]:
        """Every byte of every region against what must be there: blocks read, own blocks, and the gaps."""
        found = []
        for name, (region, buffer) in self._buffers.items():
            view, came_from = _content(buffer), placed.get(name, {})
            for block_id in range(region.num_blocks):
                seed, source = came_from.get(block_id, (self._seed, block_id))
                start = block_id * region.stride
                end = start + region.block_bytes
                if view[start:end] != block_bytes_of(seed, name, source, region.block_bytes):
                    found.append(f"block {block_id} of {name} is not block {source} of {seed}")
                if bytes(view[end : start + region.stride]).strip(GAP):
                    found.append(f"the bytes after block {block_id} of {name} were written to")
        return found

    def remember(self) -> None:
        """Take the present resources as those that must be left."""
        self._baseline = _resources()

    def left_over(self) -> dict[str, int]:
        """By how much each resource is above what `remember` found."""
        more = {name: count - self._baseline[name] for name, count in _resources().items()}
        return {name: count for name, count in more.items() if count > 0}

    def close(self) -> None:
        """Close twice; then another `open` may follow."""
        self._open_one.close()
        self._open_one.close()
        self.transfer = None
        self._peers, self._buffers = [], {}

    def poll(self) -> None:
        if self.transfer is not None:
            self.completions += self.transfer.poll()

    def wakeups(self) -> list[int]:
        descriptor = self.transfer.wakeup_fd() if self.transfer is not None else None
        return [] if descriptor is None else [descriptor]

    def tick_s(self) -> float:
        """As `KVTransfer.tick_s`, with a bound for where only the descriptor counts."""
        return (self.transfer.tick_s() if self.transfer is not None else 0.0) or 1.0

    @property
    def _open_one(self) -> KVTransfer:
        assert self.transfer is not None, "open comes first"
        return self.transfer

    def _register(self, transfer: KVTransfer, name: str, num_blocks: int, block_bytes: int, stride: int) -> None:
        num_bytes = num_blocks * max(stride, block_bytes)  # a bad stride is for `register` to find
        buffer = transfer.allocate(num_bytes) or self._foreign_buffer(num_bytes)
        region = Region(name, buffer.address, num_blocks, block_bytes, stride, buffer.kind)
        content = bytearray(GAP * num_bytes)
        for block_id in range(num_blocks):
            start = block_id * stride
            content[start : start + block_bytes] = block_bytes_of(self._seed, name, block_id, block_bytes)
        _fill(buffer, bytes(content))
        transfer.register(region)
        self._buffers[name] = region, buffer

    def _foreign_buffer(self, num_bytes: int) -> Buffer:
        """Memory of the site's device that the transfer did not give."""
        if self._config.device == "cpu":
            return _host_buffer(num_bytes)
        return cuda_driver.allocate(num_bytes, self._config.device)


COMMANDS = {
    name: getattr(Site, name)
    for name in (
        "open", "info", "caps", "register", "unreachable", "import_peer", "read", "cancel", "wait", "count", "map",
        "drop", "problems", "remember", "left_over", "close",
    )
}  # fmt: skip


def main() -> None:
    """Serve until the other end of the descriptor is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    site = Site()
    while True:
        ready, _, _ = select.select([control.fileno(), *site.wakeups()], [], [], site.tick_s())
        site.poll()
        if control.fileno() not in ready:
            continue
        message = control.recv(MAX_MESSAGE_BYTES)
        if not message:
            return
        control.send(msgspec.msgpack.encode(_obey(site, message)))


def _obey(site: Site, message: bytes) -> list[Any]:
    name, *arguments = msgspec.msgpack.decode(message)
    try:
        return ["done", COMMANDS[name](site, *arguments)]
    except Exception as error:
        return ["raised", type(error).__name__, str(error)]


def _host_buffer(num_bytes: int) -> Buffer:
    memory = mmap.mmap(-1, num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return Buffer(address, num_bytes, MemoryKind.HOST, memory, memoryview(memory))


def _fill(buffer: Buffer, content: bytes) -> None:
    if buffer.kind is MemoryKind.CUDA:
        cuda_driver.write(buffer.address, content)
    else:
        _view(buffer)[: len(content)] = content


def _content(buffer: Buffer) -> memoryview:
    """All of it; of GPU memory a copy."""
    if buffer.kind is MemoryKind.CUDA:
        return memoryview(cuda_driver.read(buffer.address, buffer.num_bytes))
    return _view(buffer)


def _view(buffer: Buffer) -> memoryview:
    assert buffer.view is not None, "host memory has a view"
    return buffer.view


def _resources() -> dict[str, int]:
    """What a process can leak. Private mappings are left out: the memory allocator's come and go."""
    mappings = Path("/proc/self/maps").read_text().splitlines()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared mappings": sum(line.split()[1].endswith("s") for line in mappings),
    }


if __name__ == "__main__":
    main()
