"""The KVTransfer over NIXL; the package's text tells what to know."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from trtserve.plugins.transfer.cuda_driver import device_index
from trtserve.plugins.transfer.export import check_same_shape, decode_export, encode_export, region_end
from trtserve.plugins.transfer.identity import peer_info, why_memory_is_apart
from trtserve.plugins.transfer.nixl import library
from trtserve.plugins.transfer.nixl.agent import Agent, AgentError, PeerLost
from trtserve.plugins.transfer.nixl.importer import PeerImporter
from trtserve.plugins.transfer.nixl.layout import cut_plan
from trtserve.plugins.transfer.nixl.payload import VERSION, agent_name, decode_payload, encode_payload
from trtserve.plugins.transfer.nixl.peer import NixlPeer
from trtserve.plugins.transfer.nixl.reader import NixlReader
from trtserve.plugins.transfer.plan import check_plan, check_region
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

NAME = "nixl"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Open:
    """What there is between `open` and `close`."""

    config: TransferConfig
    info: PeerInfo
    thread_id: int
    agent: Agent
    reader: NixlReader
    importer: PeerImporter


class NixlTransfer:
    """See `trtserve.plugins.transfer_api.KVTransfer`. A call from another thread than that of `open` raises
    RuntimeError: NIXL's agent may crash the process over it."""

    def __init__(self) -> None:
        self._open: _Open | None = None
        self._regions: dict[str, Region] = {}

    @property
    def name(self) -> str:
        return NAME

    @property
    def caps(self) -> TransferCaps:
        kinds = frozenset({MemoryKind.HOST, MemoryKind.CUDA})
        return TransferCaps(memory=kinds, across_nodes=True, owns_memory=False)

    def open(self, config: TransferConfig) -> None:
        """Takes some tenths of a second."""
        if self._open is not None:
            raise TransferError("transfer nixl is open already")
        if (problem := library.missing() or library.other_ucx()) is not None:
            raise TransferError(problem)
        try:
            agent = Agent(library.load(config.device), agent_name(config.worker_id, config.incarnation))
        except (ImportError, AttributeError, AgentError, PeerLost) as error:
            raise TransferError(f"transfer nixl cannot be opened: {error}") from error
        info, reader = peer_info(config), NixlReader(agent)
        importer = PeerImporter(agent, reader, info)
        self._open = _Open(config, info, threading.get_ident(), agent, reader, importer)

    def allocate(self, num_bytes: int) -> Buffer | None:
        return None

    def register(self, region: Region) -> None:
        opened = self._opened()
        check_region(region, self._regions)
        device = device_index(opened.config.device) if region.kind is MemoryKind.CUDA else 0
        try:
            opened.agent.register(region.address, region_end(region) - region.address, region.kind, device)
        except (AgentError, PeerLost) as error:
            raise TransferError(
                f"NIXL cannot register region {region.name!r} ({region.kind} memory): {error}{_advice(region)}"
            ) from None
        self._regions[region.name] = region

    def export(self) -> bytes:
        opened = self._opened()
        try:
            metadata = opened.agent.metadata()
        except (AgentError, PeerLost) as error:
            raise TransferError(f"NIXL does not tell how to connect: {error}") from None
        opened.reader.expect()
        return encode_export(NAME, VERSION, opened.config, self._regions.values(), encode_payload(metadata))

    def unreachable(self, peer: PeerInfo) -> str | None:
        # TCP reaches whatever can be reached; only `import_peer` tells.
        return None

    def import_peer(self, peer: PeerInfo, exported: bytes, deadline_s: float) -> Peer:
        """The peer must poll meanwhile. A peer that is imported already must be dropped first."""
        opened = self._opened()
        if (peer.worker_id, peer.incarnation) == (opened.info.worker_id, opened.info.incarnation):
            raise TransferError(f"worker {peer.worker_id} is this one")
        export = decode_export(exported, NAME, VERSION, peer)
        metadata = decode_payload(export.payload, peer)
        check_same_shape(self._regions, export.regions)
        imported = opened.importer.import_peer(peer, export, metadata, self._regions, deadline_s)
        _log_lane(imported, opened.info)
        return imported

    def read_blocks(self, peer: Peer, plan: ReadPlan, deadline_s: float) -> TransferId:
        """Over CMA the first piece is copied before this returns, and others by `poll`."""
        reader, source = self._opened().reader, _own(peer)
        check_plan(plan, self._regions, source.regions)
        pieces = tuple(cut_plan(plan, self._regions, source.regions, source.layouts))
        return reader.begin(source, iter(pieces), deadline_s)

    def poll(self) -> list[Completion]:
        if self._open is None:
            return []
        reader = self._opened().reader
        reader.turn()
        return reader.take_completions()

    def wakeup_fd(self) -> int | None:
        """For what does not wait for peers; `tick_s` counts all the same."""
        return None if self._open is None else self._opened().reader.event_fd

    def tick_s(self) -> float:
        return 0.0 if self._open is None else self._opened().reader.tick_s()

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        return Cancelled.STOPPED if self._open is None else self._opened().reader.cancel(transfer_id)

    def map_blocks(self, peer: Peer, region: str, block_ids: Sequence[int]) -> list[memoryview] | None:
        return None

    def drop_peer(self, peer: Peer) -> None:
        if self._open is not None:
            self._opened().reader.drop(_own(peer), "the peer was dropped")

    def close(self) -> None:
        if self._open is None:
            return
        opened, self._open = self._opened(), None
        opened.reader.close()
        opened.agent.close()
        opened.reader.stages.close()
        self._regions.clear()

    def _opened(self) -> _Open:
        if self._open is None:
            raise TransferError("transfer nixl is not open")
        if threading.get_ident() != self._open.thread_id:
            raise RuntimeError("transfer nixl is used from another thread than the one that opened it")
        return self._open


def _advice(region: Region) -> str:
    """What it mostly is: NIXL's UCX without the CUDA runtime of its version takes any memory for the host's."""
    if region.kind is not MemoryKind.CUDA:
        return ""
    return "; beside CUDA 12 it has to be the package nixl-cu12, beside CUDA 13 nixl-cu13"


def _log_lane(peer: NixlPeer, own: PeerInfo) -> None:
    gb_per_s = peer.bandwidth_bytes_per_s / 1e9
    _log.info("worker %s is read over %s, %.2f GB/s when tried", peer.info.worker_id, peer.lane, gb_per_s)
    if peer.lane == "tcp" and why_memory_is_apart(own, peer.info, by_pid=True) is None and library.is_free_to_choose():
        _log.warning(
            "worker %s is read over tcp though its memory is near: may the two processes ptrace each other?",
            peer.info.worker_id,
        )


def _own(peer: Peer) -> NixlPeer:
    if not isinstance(peer, NixlPeer):
        raise TypeError(f"a peer of transfer {NAME} is wanted, not {type(peer).__name__}")
    return peer
