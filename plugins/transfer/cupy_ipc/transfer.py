"""The KVTransfer by CUDA IPC; the package's text tells what to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from trtserve.plugins.transfer.cuda_driver import device_index
from trtserve.plugins.transfer.cupy_ipc.device import CupyDevice, Device, DeviceError
from trtserve.plugins.transfer.cupy_ipc.payload import MAX_ALLOCATIONS, VERSION, Allocation, Payload, decode_payload
from trtserve.plugins.transfer.cupy_ipc.peer import CupyPeer, open_peer
from trtserve.plugins.transfer.cupy_ipc.reads import READING_TICK_S, Reads
from trtserve.plugins.transfer.export import check_same_shape, decode_export, encode_export
from trtserve.plugins.transfer.identity import peer_info, why_memory_is_apart
from trtserve.plugins.transfer.plan import check_plan, check_region
from trtserve.plugins.transfer.probe import PROBE_BYTES, bandwidth, probe_span
from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer_api import (
    Buffer,
    Cancelled,
    Completion,
    MemoryKind,
    Peer,
    PeerInfo,
    ReadPlan,
    Region,
    TransferCaps,
    TransferConfig,
    TransferError,
    TransferId,
)

NAME = "cupy_ipc"

_GRANULE_BYTES = 2 << 20
"""CUDA exports whole pages of this size: an allocation that shares one would export its neighbours too."""

_CLOSE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is between `open` and `close`."""

    config: TransferConfig
    info: PeerInfo
    device: Device
    reads: Reads
    scratch: int  # PROBE_BYTES that probes are read into


class CupyIpcTransfer:
    """See `trtserve.plugins.transfer_api.KVTransfer`. make_device: the GPU of an index, for tests without one."""

    def __init__(self, make_device: Callable[[int], Device] = CupyDevice) -> None:
        self._make_device = make_device
        self._open: _Open | None = None
        self._allocations: list[Allocation] = []
        self._regions: dict[str, Region] = {}
        self._peers: list[CupyPeer] = []

    @property
    def name(self) -> str:
        return NAME

    @property
    def caps(self) -> TransferCaps:
        return TransferCaps(memory=frozenset({MemoryKind.CUDA}), across_nodes=False, owns_memory=True)

    def open(self, config: TransferConfig) -> None:
        if self._open is not None:
            raise TransferError("transfer cupy_ipc is open already")
        index = device_index(config.device)
        try:
            device = self._make_device(index)
            scratch = device.allocate(PROBE_BYTES)
        except DeviceError as error:
            raise TransferError(f"transfer cupy_ipc cannot be opened: {error}") from None
        info = peer_info(config, device.uuid)
        self._open = _Open(config, info, device, Reads(device), scratch)

    def allocate(self, num_bytes: int) -> Buffer:
        """Zero bytes are an error of CUDA's. Freed by `close`; nobody may have it open then."""
        device = self._opened().device
        if len(self._allocations) >= MAX_ALLOCATIONS:
            raise TransferError(f"transfer cupy_ipc makes at most {MAX_ALLOCATIONS} allocations")
        whole = -(-num_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        try:
            address = device.allocate(whole)
            self._allocations.append(Allocation(address, whole, device.handle(address)))
        except DeviceError as error:
            raise TransferError(f"no {whole / 2**30:.2f} GiB of GPU memory for KV rows: {error}") from None
        return Buffer(address, num_bytes, MemoryKind.CUDA, self)

    def register(self, region: Region) -> None:
        self._opened()
        check_region(region, self._regions)
        if region.kind is not MemoryKind.CUDA or not any(each.holds(region) for each in self._allocations):
            raise TransferError(f"region {region.name!r} is not in memory that transfer cupy_ipc allocated")
        self._regions[region.name] = region

    def export(self) -> bytes:
        opened = self._opened()
        payload = msgspec.msgpack.encode(Payload(opened.device.uuid, self._allocations))
        return encode_export(NAME, VERSION, opened.config, self._regions.values(), payload)

    def unreachable(self, peer: PeerInfo) -> str | None:
        opened = self._opened()
        problem = why_memory_is_apart(opened.info, peer, by_pid=True)
        if problem is not None or not peer.device_uuid:
            return problem or f"worker {peer.worker_id} has its KV on {peer.device}, not on a GPU"
        try:
            return opened.device.why_apart(peer.device_uuid)
        except DeviceError as error:
            return str(error)

    def import_peer(self, peer: PeerInfo, exported: bytes, deadline_s: float) -> Peer:
        opened = self._opened()
        if (problem := self.unreachable(peer)) is not None:
            raise TransferError(problem)
        export = decode_export(exported, NAME, VERSION, peer)
        payload = decode_payload(export.payload, peer, export.regions.values())
        check_same_shape(self._regions, export.regions)
        is_own_process = (peer.pid, peer.pid_namespace) == (opened.info.pid, opened.info.pid_namespace)
        imported = open_peer(opened.device, peer, payload, export.regions, is_own_process=is_own_process)
        try:
            imported.bandwidth_bytes_per_s = self._probe(imported, deadline_s)
        except BaseException:
            imported.close(opened.device)
            raise
        self._peers.append(imported)
        return imported

    def read_blocks(self, peer: Peer, plan: ReadPlan, deadline_s: float) -> TransferId:
        opened, source = self._opened(), self._known(peer)
        num_bytes = check_plan(plan, self._regions, source.regions)
        return opened.reads.begin(source, plan, self._regions, num_bytes, deadline_s)

    def poll(self) -> list[Completion]:
        return [] if self._open is None else self._open.reads.turn()

    def wakeup_fd(self) -> int | None:
        return None

    def tick_s(self) -> float:
        return READING_TICK_S if self._open is not None and len(self._open.reads) else 0.0

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        return Cancelled.STOPPED if self._open is None else self._open.reads.cancel(transfer_id)

    def map_blocks(self, peer: Peer, region: str, block_ids: Sequence[int]) -> list[memoryview] | None:
        return None

    def drop_peer(self, peer: Peer) -> None:
        for known in self._peers:
            if known is peer:
                self._opened().reads.drop(known)
        self._peers = [known for known in self._peers if known is not peer]

    def close(self) -> None:
        """Waits for what is queued, a moment: memory must not be freed under it."""
        if self._open is None:
            return
        opened = self._open
        for peer in self._peers:
            opened.reads.drop(peer)
        until_s = time.monotonic() + _CLOSE_S
        while len(opened.reads) and time.monotonic() < until_s:
            opened.reads.turn()
        self._open = None
        self._peers, self._regions = [], {}
        if not len(opened.reads):
            self._free(opened)
        self._allocations = []

    def _free(self, opened: _Open) -> None:
        for address in (opened.scratch, *(allocation.address for allocation in self._allocations)):
            with suppress(DeviceError):  # a broken context has freed it
                opened.device.free(address)

    def _probe(self, peer: CupyPeer, deadline_s: float) -> float:
        """Read a little twice, to set up and to time; bytes per second, 0 of a peer without regions."""
        opened = self._opened()
        span = probe_span(peer.regions.values())
        if span is None:
            return 0.0
        until_s = time.monotonic() + deadline_s
        duration_s = 0.0
        try:
            for _ in range(2):
                begun_s = time.perf_counter()
                opened.device.copy([Run(span.address, opened.scratch, span.num_bytes)])
                event = opened.device.mark()
                while not opened.device.has_come(event):
                    if time.monotonic() > until_s:
                        raise TransferError(f"a read from worker {peer.info.worker_id} did not end in time")
                duration_s = time.perf_counter() - begun_s
        except DeviceError as error:
            raise TransferError(f"no read from worker {peer.info.worker_id}: {error}") from None
        return bandwidth(span.num_bytes, duration_s)

    def _known(self, peer: Peer) -> CupyPeer:
        for known in self._peers:
            if known is peer:
                return known
        raise ValueError(f"worker {peer.info.worker_id} is not imported, or was dropped")

    def _opened(self) -> _Open:
        if self._open is None:
            raise TransferError("transfer cupy_ipc is not open")
        return self._open
