"""Makes a peer of an export: connects, reads a little to see that it works, and measures how fast."""

from __future__ import annotations

from ctypes import byref
from time import monotonic

from trtserve.plugins.transfer.export import Export
from trtserve.plugins.transfer.probe import PROBE_BYTES, Span, bandwidth, probe_span
from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer.ucx.libucp import UcxError
from trtserve.plugins.transfer.ucx.payload import Payload
from trtserve.plugins.transfer.ucx.peer import UcxPeer
from trtserve.plugins.transfer.ucx.read import Gets
from trtserve.plugins.transfer.ucx.reader import UcxReader
from trtserve.plugins.transfer.ucx.worker import MappedMemory, UcxWorker
from trtserve.plugins.transfer_api import MemoryKind, PeerInfo, TransferError, TransferOutcome

_ATTEMPTS = 3
"""A peer that reads from here may have left half a connection behind, which UCX takes up again and finds reset."""

_FIRST_BYTES = 64  # of the read that connects


class PeerImporter:
    """Owns the memory that probes are read into: nobody's block, and kept, since a late get may still write there."""

    def __init__(self, worker: UcxWorker, reader: UcxReader) -> None:
        self._worker = worker
        self._reader = reader
        self._scratch: dict[MemoryKind, MappedMemory] = {}

    def import_peer(self, info: PeerInfo, export: Export, payload: Payload, deadline_s: float) -> UcxPeer:
        """Blocks up to deadline_s seconds. Raises TransferError."""
        until_s = monotonic() + deadline_s
        for attempt in range(1, _ATTEMPTS + 1):
            peer = self._connect(info, export, payload)
            try:
                self._probe(peer, until_s)
                return peer
            except BaseException as error:
                is_last = attempt == _ATTEMPTS or peer.lost is None or monotonic() >= until_s
                self._reader.drop(peer, "its probe failed")
                if is_last or not isinstance(error, TransferError):
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _connect(self, info: PeerInfo, export: Export, payload: Payload) -> UcxPeer:
        try:
            return self._reader.connect(info, payload.address, export.regions, payload.rkeys)
        except UcxError as error:
            versions = f"UCX {payload.ucx_version} there, {self._worker.library.version()} here"
            raise TransferError(f"no connection to worker {info.worker_id} ({versions}): {error}") from None

    def _probe(self, peer: UcxPeer, until_s: float) -> None:
        """Read twice: to connect, then to time it. A peer without regions has nothing to read."""
        spans = {name: span for name, region in peer.regions.items() if (span := probe_span([region]))}
        if not spans:
            return
        name = max(spans, key=lambda name: spans[name].num_bytes)
        span = spans[name]
        self._read(peer, name, Span(span.address, min(_FIRST_BYTES, span.num_bytes)), until_s)
        peer.bandwidth_bytes_per_s = bandwidth(span.num_bytes, self._read(peer, name, span, until_s))
        peer.lane = peer.endpoint.lane()

    def _read(self, peer: UcxPeer, region: str, span: Span, until_s: float) -> float:
        """Into the scratch memory; returns seconds."""
        target = self._scratch_of(peer.regions[region].kind)
        run = Run(span.address, target.address, span.num_bytes)
        gets = Gets([run], peer.rkeys[region], byref(target.get_param))
        try:
            completion = self._reader.run(peer, iter([gets]), until_s - monotonic())
        except TimeoutError as error:
            raise TransferError(f"no answer from worker {peer.info.worker_id}: {error}") from None
        if completion.outcome is not TransferOutcome.DONE:
            raise TransferError(f"no read from worker {peer.info.worker_id}: {completion.reason}")
        return completion.duration_s

    def _scratch_of(self, kind: MemoryKind) -> MappedMemory:
        if kind not in self._scratch:
            try:
                self._scratch[kind] = self._worker.allocate(PROBE_BYTES, kind)
            except UcxError as error:
                raise TransferError(f"UCX has no {kind} memory for a probe: {error}") from None
        return self._scratch[kind]
