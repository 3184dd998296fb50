"""Makes a peer of an export: connects, reads a little to see that it works, and finds out how it is read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from time import monotonic, perf_counter

from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer.cuda_driver import device_index
from trtserve.plugins.transfer.export import Export
from trtserve.plugins.transfer.identity import same_node
from trtserve.plugins.transfer.nixl.agent import Agent, AgentError, PeerLost
from trtserve.plugins.transfer.nixl.layout import make_layout
from trtserve.plugins.transfer.nixl.payload import agent_name
from trtserve.plugins.transfer.nixl.peer import DIRECT, STAGED, Flight, Lists, NixlPeer, Scratch
from trtserve.plugins.transfer.nixl.reader import NixlReader
from trtserve.plugins.transfer.probe import PROBE_BYTES, Span, bandwidth, probe_span
from trtserve.plugins.transfer_api import Buffer, MemoryKind, PeerInfo, Region, TransferError

STAGED_BELOW_BYTES_PER_S = 3e9
"""Lanes slower than this are TCP, where a peer that hangs holds a read up for ever; a second copy costs them little.
RDMA is faster, needs no living peer, and reports a dead one."""

_ATTEMPTS = 3
"""A peer that reads from here may have left half a connection behind, which UCX takes up again and finds reset."""

_FIRST_BYTES = 64  # of the read that connects
_TIMED_READS = 3
_PAUSE_S = 0.0002


class PeerImporter:
    """Blocks while it imports; other reads move on meanwhile."""

    def __init__(self, agent: Agent, reader: NixlReader, own_info: PeerInfo) -> None:
        self._agent = agent
        self._reader = reader
        self._own_info = own_info
        self._gpu_memory: Buffer | None = None

    def import_peer(
        self, info: PeerInfo, export: Export, metadata: bytes, own: Mapping[str, Region], deadline_s: float
    ) -> NixlPeer:
        """Blocks up to deadline_s seconds. own: the own regions by name. Raises TransferError."""
        name = agent_name(info.worker_id, info.incarnation)
        until_s = monotonic() + deadline_s
        for attempt in range(1, _ATTEMPTS + 1):
            peer = self._reader.connect(info, name, export, metadata)
            try:
                self._probe(peer, until_s)
                self._prepare(peer, own)
                return peer
            except BaseException as error:
                is_last = attempt == _ATTEMPTS or peer.lost is None or monotonic() >= until_s
                self._reader.drop(peer, "its import failed")
                if is_last or not isinstance(error, TransferError):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _probe(self, peer: NixlPeer, until_s: float) -> None:
        """Read to connect, then to time it; the best time counts, since the first ones also set up pages and lanes. A
        peer without regions has nothing to read."""
        spans = {region.name: span for region in peer.regions.values() if (span := probe_span([region]))}
        if not spans:
            return
        name = max(spans, key=lambda name: spans[name].num_bytes)
        span, kind = spans[name], peer.regions[name].kind
        self._read(peer, Span(span.address, min(_FIRST_BYTES, span.num_bytes)), kind, until_s)
        is_over_at_once = False
        for _ in range(_TIMED_READS):
            begun_s = perf_counter()
            is_over_at_once |= self._read(peer, span, kind, until_s)
            measured = bandwidth(span.num_bytes, perf_counter() - begun_s)
            peer.bandwidth_bytes_per_s = max(peer.bandwidth_bytes_per_s, measured)
        self._decide(peer, kind, is_over_at_once)

    def _decide(self, peer: NixlPeer, kind: MemoryKind, is_over_at_once: bool) -> None:
        """NIXL does not tell how it reads; how the probe went does."""
        if kind is MemoryKind.HOST and is_over_at_once and same_node(self._own_info, peer.info):
            peer.lane, peer.way = "cma", DIRECT
        elif peer.bandwidth_bytes_per_s < STAGED_BELOW_BYTES_PER_S:
            peer.lane, peer.way = "tcp", STAGED
        else:
            peer.lane, peer.way = "cuda" if kind is MemoryKind.CUDA else "rdma", DIRECT

    def _read(self, peer: NixlPeer, span: Span, kind: MemoryKind, until_s: float) -> bool:
        """Into the stage, or into scratch memory of the GPU; returns whether the call that began it also ended it."""
        device = device_index(peer.info.device) if kind is MemoryKind.CUDA else 0
        try:
            flight = peer.probe(span.address, span.num_bytes, device, self._scratch_of(peer, kind))
        except (PeerLost, AgentError) as error:
            peer.lose(str(error))
            raise TransferError(f"no read from worker {peer.info.worker_id}: {error}") from None
        if flight.is_over:
            return True
        self._wait(peer, flight, until_s)
        return False

    def _scratch_of(self, peer: NixlPeer, kind: MemoryKind) -> Scratch:
        if kind is MemoryKind.HOST:
            return Scratch(peer.stage.address, kind, 0)
        if self._gpu_memory is None:
            device = self._own_info.device
            self._gpu_memory = cuda_driver.allocate(PROBE_BYTES, device)
            self._agent.register(self._gpu_memory.address, PROBE_BYTES, kind, device_index(device))
        return Scratch(self._gpu_memory.address, kind, device_index(self._own_info.device))

    def _wait(self, peer: NixlPeer, flight: Flight, until_s: float) -> None:
        while not flight.is_over:
            if peer.lost is not None:
                raise TransferError(f"no read from worker {peer.info.worker_id}: {peer.lost}")
            if monotonic() >= until_s:
                raise TransferError(
                    f"worker {peer.info.worker_id} did not answer in time; does it call its transfer's poll?"
                )
            time.sleep(_PAUSE_S)
            self._reader.turn()

    def _prepare(self, peer: NixlPeer, own: Mapping[str, Region]) -> None:
        """The descriptor lists of all regions that both sides have."""
        names = sorted(own.keys() & peer.regions.keys())
        for kind in MemoryKind:
            own_regions = [own[name] for name in names if own[name].kind is kind]
            if not own_regions:
                continue
            is_cuda = kind is MemoryKind.CUDA
            own_layout = make_layout(own_regions, device_index(self._own_info.device) if is_cuda else 0)
            peer_regions = [peer.regions[region.name] for region in own_regions]
            peer_layout = make_layout(peer_regions, device_index(peer.info.device) if is_cuda else 0)
            peer.layouts[kind] = own_layout, peer_layout
            try:
                own_list = self._agent.own_list(own_layout.rows, kind)
                peer.lists[kind] = Lists(own_list, self._agent.peer_list(peer.name, peer_layout.rows, kind))
            except (PeerLost, AgentError) as error:
                raise TransferError(
                    f"the regions of worker {peer.info.worker_id} are not all in the memory it has registered: {error}"
                ) from None
