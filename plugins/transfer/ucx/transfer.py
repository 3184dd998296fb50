"""The KVTransfer over UCX: one worker, an endpoint for each peer, and no thread of ours.

Everything happens inside the calls of `trtserve.plugins.transfer_api`. `poll` has a slice of time for copying: over CMA
a progress call in this process copies, without the peer. Over TCP the peer must call `poll` when its wakeup descriptor
says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from ctypes import byref
from dataclasses import dataclass

from trtserve.plugins.transfer.export import check_same_shape, decode_export, encode_export, region_end
from trtserve.plugins.transfer.identity import peer_info, why_memory_is_apart
from trtserve.plugins.transfer.plan import check_plan, check_region
from trtserve.plugins.transfer.runs import PIECE_BYTES, cut_pieces, merge_runs
from trtserve.plugins.transfer.ucx import environment, libucp
from trtserve.plugins.transfer.ucx.importer import PeerImporter
from trtserve.plugins.transfer.ucx.libucp import UcxError
from trtserve.plugins.transfer.ucx.payload import VERSION, decode_payload, encode_payload
from trtserve.plugins.transfer.ucx.peer import UcxPeer
from trtserve.plugins.transfer.ucx.read import Gets
from trtserve.plugins.transfer.ucx.reader import UcxReader
from trtserve.plugins.transfer.ucx.worker import MappedMemory, UcxWorker
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

NAME = "ucx"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is between `open` and `close`."""

    config: TransferConfig
    worker: UcxWorker
    reader: UcxReader
    importer: PeerImporter


class UcxTransfer:
    """See `trtserve.plugins.transfer_api.KVTransfer`."""

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._regions: dict[str, Region] = {}
        self._mapped: dict[str, MappedMemory] = {}  # in the regions' order

    @property
    def name(self) -> str:
        return NAME

    @property
    def caps(self) -> TransferCaps:
        kinds = frozenset({MemoryKind.HOST, MemoryKind.CUDA})
        return TransferCaps(memory=kinds, across_nodes=True, owns_memory=False)

    def open(self, config: TransferConfig) -> None:
        if self._open is not None:
            raise TransferError("transfer ucx is open already")
        if environment.nixl_is_loaded():
            raise TransferError(environment.NIXL_IS_LOADED)
        environment.set_defaults()
        try:
            worker = UcxWorker(libucp.load())
        except (OSError, AttributeError, UcxError) as error:
            raise TransferError(f"transfer ucx cannot be opened: {error}") from error
        reader = UcxReader(worker)
        self._open = _Open(config, worker, reader, PeerImporter(worker, reader))

    def allocate(self, num_bytes: int) -> Buffer | None:
        return None

    def register(self, region: Region) -> None:
        opened = self._opened()
        check_region(region, self._regions)
        try:
            memory = opened.worker.map(region.address, region_end(region) - region.address, region.kind)
        except UcxError as error:
            raise TransferError(f"UCX cannot register region {region.name!r} ({region.kind} memory): {error}") from None
        self._mapped[region.name] = memory
        self._regions[region.name] = region

    def export(self) -> bytes:
        opened = self._opened()
        rkeys = [memory.packed_rkey for memory in self._mapped.values()]
        payload = encode_payload(opened.worker.library.version(), opened.worker.address(), rkeys)
        return encode_export(NAME, VERSION, opened.config, self._regions.values(), payload)

    def unreachable(self, peer: PeerInfo) -> str | None:
        # TCP reaches whatever can be reached; only `import_peer` tells.
        return None

    def import_peer(self, peer: PeerInfo, exported: bytes, deadline_s: float) -> Peer:
        opened = self._opened()
        export = decode_export(exported, NAME, VERSION, peer)
        payload = decode_payload(export.payload, len(export.regions))
        check_same_shape(self._regions, export.regions)
        imported = opened.importer.import_peer(peer, export, payload, deadline_s)
        _log_lane(imported, peer_info(opened.config))
        return imported

    def read_blocks(self, peer: Peer, plan: ReadPlan, deadline_s: float) -> TransferId:
        reader, source = self._opened().reader, _own(peer)
        check_plan(plan, self._regions, source.regions)
        return reader.begin(source, self._gets(source, plan), deadline_s)

    def poll(self) -> list[Completion]:
        if self._open is None:
            return []
        self._open.reader.turn()
        return self._open.reader.take_completions()

    def wakeup_fd(self) -> int | None:
        return None if self._open is None else self._open.worker.event_fd

    def tick_s(self) -> float:
        return 0.0 if self._open is None else self._open.reader.tick_s()

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        return Cancelled.STOPPED if self._open is None else self._open.reader.cancel(transfer_id)

    def map_blocks(self, peer: Peer, region: str, block_ids: Sequence[int]) -> list[memoryview] | None:
        return None

    def drop_peer(self, peer: Peer) -> None:
        if self._open is not None:
            self._open.reader.drop(_own(peer), "the peer was dropped")

    def close(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.reader.close()
            opened.worker.close()
        self._regions.clear()
        self._mapped.clear()

    def _opened(self) -> _Open:
        if self._open is None:
            raise TransferError("transfer ucx is not open")
        return self._open

    def _gets(self, peer: UcxPeer, plan: ReadPlan) -> Iterator[Gets]:
        for copies in plan.copies:
            rkey, param = peer.rkeys[copies.region], byref(self._mapped[copies.region].get_param)
            runs = merge_runs(ReadPlan([copies]), self._regions, peer.regions)
            # Cutting costs what a small get costs, and scattered blocks need none.
            pieces = cut_pieces(runs) if any(run.num_bytes > PIECE_BYTES for run in runs) else (runs,)
            for piece in pieces:
                yield Gets(piece, rkey, param)


def _log_lane(peer: UcxPeer, own: PeerInfo) -> None:
    gb_per_s = peer.bandwidth_bytes_per_s / 1e9
    _log.info("worker %s is read over %s, %.2f GB/s when tried", peer.info.worker_id, peer.lane, gb_per_s)
    is_slower_than_need_be = peer.lane == "tcp" and why_memory_is_apart(own, peer.info, by_pid=True) is None
    if is_slower_than_need_be and not environment.user_chose_transports():
        _log.warning(
            "worker %s is read over tcp though its memory is near: may the two processes ptrace each other?",
            peer.info.worker_id,
        )


def _own(peer: Peer) -> UcxPeer:
    if not isinstance(peer, UcxPeer):
        raise TypeError(f"a peer of transfer {NAME} is wanted, not {type(peer).__name__}")
    return peer
