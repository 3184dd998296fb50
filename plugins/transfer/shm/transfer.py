"""The transfer itself; the package's text tells how it works."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import count

import msgspec
from pydantic import ValidationError

from trtserve.plugins.transfer.export import check_same_shape, decode_export, encode_export
from trtserve.plugins.transfer.identity import peer_info, why_memory_is_apart
from trtserve.plugins.transfer.plan import check_plan, check_region
from trtserve.plugins.transfer.runs import merge_runs
from trtserve.plugins.transfer.shm.handout import MAX_SEGMENTS, DescriptorServer
from trtserve.plugins.transfer.shm.options import ShmOptions
from trtserve.plugins.transfer.shm.peer import (
    Payload,
    SegmentPlace,
    ShmPeer,
    decode_payload,
    holds,
    map_segments,
    measure,
    regions_here,
)
from trtserve.plugins.transfer.shm.reads import Read, ReadQueue
from trtserve.plugins.transfer.shm.segment import OwnSegment
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
    TransferOutcome,
)

VERSION = 1  # of the export's payload
MAX_READS = 4096
SMALL_READ_BYTES = 1 << 20  # not worth waking a thread for
HELP_S = 0.01


class ShmTransfer:
    """One per worker process; see `KVTransfer` for the order of calls."""

    name = "shm"
    caps = TransferCaps(frozenset({MemoryKind.HOST}), across_nodes=False, owns_memory=True, maps_blocks=True)

    def __init__(self) -> None:
        self._is_open = False
        self._segments: list[OwnSegment] = []
        self._regions: dict[str, Region] = {}
        self._peers: list[ShmPeer] = []
        self._ids = count(1)

    def open(self, config: TransferConfig) -> None:
        try:
            options = ShmOptions.model_validate(dict(config.options))
        except ValidationError as error:
            raise TransferError(f"bad options of transfer shm: {error}") from None
        self._config, self._info = config, peer_info(config)
        self._handout = DescriptorServer(config)
        self._handout.start()
        try:
            self._reads = ReadQueue(options.copy_threads)
        except OSError as error:
            self._handout.close()
            raise TransferError(f"transfer shm cannot open an eventfd: {error}") from error
        self._is_open = True

    def allocate(self, num_bytes: int) -> Buffer:
        """Shared memory, zeroed and populated. Raises TransferError where the machine has not that much."""
        if len(self._segments) == MAX_SEGMENTS:
            raise TransferError(f"transfer shm hands out at most {MAX_SEGMENTS} pieces of memory; allocate larger ones")
        try:
            segment = OwnSegment(num_bytes)
        except OSError as error:
            raise TransferError(f"cannot allocate {num_bytes} bytes of shared memory: {error}") from error
        self._segments.append(segment)
        self._handout.descriptors.append(segment.descriptor)
        return Buffer(segment.address, num_bytes, MemoryKind.HOST, segment, segment.view(0, num_bytes))

    def register(self, region: Region) -> None:
        check_region(region, self._regions)
        if region.kind is not MemoryKind.HOST:
            raise TransferError(f"region {region.name!r}: transfer shm moves host memory, not {region.kind}")
        if not any(holds(segment, region) for segment in self._segments):
            raise TransferError(f"region {region.name!r}: transfer shm moves only memory from its own `allocate`")
        self._regions[region.name] = region

    def export(self) -> bytes:
        places = [SegmentPlace(segment.address, segment.num_bytes) for segment in self._segments]
        payload = msgspec.msgpack.encode(Payload(self._handout.name, places))
        return encode_export(self.name, VERSION, self._config, self._regions.values(), payload)

    def unreachable(self, peer: PeerInfo) -> str | None:
        return why_memory_is_apart(self._info, peer, by_pid=False)

    def import_peer(self, peer: PeerInfo, exported: bytes, deadline_s: float) -> Peer:
        """Needs the peer alive and running. Maps all of its memory, and enters as many pages into this process's page
        table as half of the deadline allows."""
        begun_s = time.monotonic()
        if (problem := self.unreachable(peer)) is not None:
            raise TransferError(problem)
        export = decode_export(exported, self.name, VERSION, peer)
        check_same_shape(self._regions, export.regions)
        payload = decode_payload(export.payload, peer)
        pid = peer.pid if peer.pid_namespace == self._info.pid_namespace else 0
        segments = map_segments(self._config.runtime_dir, payload, pid, deadline_s)
        try:
            regions = regions_here(export.regions.values(), payload.segments, segments)
        except TransferError:
            for segment in segments:
                segment.close()
            raise
        for segment in segments:
            segment.populate(begun_s + deadline_s / 2)
        self._peers.append(ShmPeer(peer, "memfd", measure(regions), regions, segments))
        return self._peers[-1]

    def read_blocks(self, peer: Peer, plan: ReadPlan, deadline_s: float) -> TransferId:
        """Copies for up to 10 ms before it returns, together with the copy threads."""
        known = self._known(peer)
        num_bytes = check_plan(plan, self._regions, known.regions)
        runs = merge_runs(plan, self._regions, known.regions)
        read = Read(TransferId(next(self._ids)), known, runs, deadline_s)
        if self._reads.num_active >= MAX_READS:
            read.stop(TransferOutcome.FAILED, f"{MAX_READS} reads are under way already")
        is_small = num_bytes <= SMALL_READ_BYTES
        self._reads.add(read, is_small=is_small)
        self._reads.help(read, math.inf if is_small else HELP_S)
        return read.transfer_id

    def poll(self) -> list[Completion]:
        return self._reads.collect() if self._is_open else []

    def wakeup_fd(self) -> int | None:
        return self._reads.event_fd

    def tick_s(self) -> float:
        return 0.0

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        has_stopped = self._reads.stop(transfer_id, TransferOutcome.CANCELLED, "cancelled")
        return Cancelled.STOPPED if has_stopped else Cancelled.DRAINING

    def map_blocks(self, peer: Peer, region: str, block_ids: Sequence[int]) -> list[memoryview] | None:
        """Views stay safe to read after `drop_peer` too; they then keep the peer's memory from being freed."""
        known = self._known(peer)
        blocks = known.regions.get(region)
        if blocks is None or not all(0 <= block_id < blocks.num_blocks for block_id in block_ids):
            raise ValueError(f"the peer has no region {region!r} with all of these blocks")
        return [known.view(blocks, block_id) for block_id in block_ids]

    def drop_peer(self, peer: Peer) -> None:
        for known in self._peers:
            if known is peer:
                self._reads.stop_all_of(known, "the peer was dropped")
                known.close()
        self._peers = [known for known in self._peers if known is not peer]

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._handout.close()
        self._reads.close()
        for peer in self._peers:
            peer.close()
        for segment in self._segments:
            segment.close()
        self._peers, self._segments, self._regions = [], [], {}

    def _known(self, peer: Peer) -> ShmPeer:
        for known in self._peers:
            if known is peer:
                return known
        raise ValueError(f"worker {peer.info.worker_id} is not imported, or was dropped")
