"""An imported peer: what is under way from it, its reads in order, and what becomes of them when it is lost."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trtserve.plugins.transfer.nixl.agent import (
    Agent,
    AgentError,
    DescriptorList,
    Indices,
    PeerLost,
    Rows,
    Transfer,
)
from trtserve.plugins.transfer.nixl.layout import Layout, Piece, Sizes, stage_rows
from trtserve.plugins.transfer.nixl.read import Read
from trtserve.plugins.transfer.nixl.stage import Stage
from trtserve.plugins.transfer_api import MemoryKind, PeerInfo, Region, TransferError, TransferOutcome

MAX_UNDER_WAY = 4
"""Pieces of one peer, for lanes that copy by themselves; enough for them to be busy from one poll to the next."""

CONNECTING, DIRECT, STAGED = "connecting", "direct", "staged"


@dataclass(slots=True, eq=False)
class Flight:
    """A transfer. read: whose piece it is; None of a probe, and once its read has ended without it."""

    transfer: Transfer
    read: Read | None
    piece: Piece | None
    into_stage: bool
    is_over: bool = False  # and well


@dataclass(frozen=True, slots=True)
class Lists:
    """The descriptor lists of one kind of memory, the own one and the peer's."""

    own: DescriptorList
    peer: DescriptorList


@dataclass(frozen=True, slots=True)
class Scratch:
    """Registered memory that probes are read into; kept, since a late read may still write there."""

    address: int
    kind: MemoryKind
    device: int  # index of the GPU; 0 for host memory


class NixlPeer:
    """One incarnation of one worker. Reads are served in order, the first one first.

    A DIRECT peer's pieces go right to their targets. A STAGED one's go to `stage`, one at a time, and are copied from
    there: a read can end although its piece is still under way, and the stage then belongs to that piece until it ends.
    """

    def __init__(self, info: PeerInfo, name: str, agent: Agent, regions: Mapping[str, Region], stage: Stage) -> None:
        """name: of the peer's agent, which is loaded. regions: the peer's, by name."""
        self.info = info
        self.name = name
        self.regions = regions
        self.stage = stage
        self.lane = "nixl"
        self.bandwidth_bytes_per_s = 0.0
        self.way = CONNECTING
        self.layouts: dict[MemoryKind, tuple[Layout, Layout]] = {}
        self.lists: dict[MemoryKind, Lists] = {}
        self.reads: list[Read] = []
        self.flights: list[Flight] = []
        self.lost: str | None = None  # why
        self._agent = agent

    @property
    def is_gone(self) -> bool:
        """Whether nothing of a lost peer is left."""
        return self.lost is not None and not self.reads and not self.flights

    @property
    def is_quiet(self) -> bool:
        """Whether what is under way, if anything, can write into the stage only."""
        return all(flight.into_stage for flight in self.flights)

    def add(self, read: Read) -> None:
        """Serve a read after the others."""
        if self.lost is not None:
            read.stop(TransferOutcome.PEER_LOST, self.lost)
        self.reads.append(read)

    def lose(self, reason: str) -> None:
        """Post nothing more; every read ends PEER_LOST, or as was decided before. Idempotent."""
        if self.lost is not None:
            return
        self.lost = reason
        for read in self.reads:
            self.stop(read, TransferOutcome.PEER_LOST, reason)

    def stop(self, read: Read, outcome: TransferOutcome, reason: str) -> None:
        """End a read early. What is under way into the stage goes on without it."""
        read.stop(outcome, reason)
        for flight in self.flights:
            if flight.read is read and flight.into_stage:
                flight.read = None
                read.end_piece(0)

    def advance(self, now_s: float) -> bool:
        """Take back what ended, see to deadlines, and post what there is room for; over CMA that is one piece. Returns
        whether there is more to do right now."""
        for flight in tuple(self.flights):
            self._check(flight)
        for read in self.reads:
            if now_s >= read.deadline_s and not read.has_ended:
                self.stop(read, TransferOutcome.TIMED_OUT, "the deadline passed")
        return self._post()

    def take_ended(self) -> list[Read]:
        """The reads that have ended, which are forgotten here."""
        ended = [read for read in self.reads if read.has_ended]
        if ended:
            self.reads = [read for read in self.reads if not read.has_ended]
        return ended

    def probe(self, address: int, num_bytes: int, device: int, scratch: Scratch) -> Flight:
        """Begin to read from an address of the peer into memory of its kind that is nobody's block. device: the peer's.
        Raises PeerLost or AgentError."""
        peer_list = self._agent.peer_list(self.name, _one_row(address, num_bytes, device), scratch.kind)
        own_list = self._agent.own_list(_one_row(scratch.address, num_bytes, scratch.device), scratch.kind)
        try:
            first = np.zeros(1, np.int32)
            transfer, is_over = self._agent.begin_read(own_list, first, peer_list, first)
        finally:
            self._agent.release(peer_list)
            self._agent.release(own_list)
        return self._took_off(Flight(transfer, None, None, into_stage=True, is_over=is_over))

    def release_lists(self) -> None:
        """Give the descriptor lists back; nothing can be posted any more."""
        for lists in self.lists.values():
            for handle in (lists.own, lists.peer):
                with suppress(PeerLost, AgentError):
                    self._agent.release(handle)
        self.lists.clear()

    def abandon(self) -> None:
        """Forget what is under way, which goes on. Does no harm where `is_quiet`, or before the agent's `close`."""
        for flight in tuple(self.flights):
            self._end(flight, 0)

    def _check(self, flight: Flight) -> None:
        try:
            if not self._agent.is_over(flight.transfer):
                return
        except (PeerLost, AgentError) as error:
            self._end(flight, 0)
            self.lose(f"a read failed: {error}")
            return
        flight.is_over = True
        self._end(flight, self._arrive(flight))

    def _post(self) -> bool:
        """Post a piece, if there is one and room for it; whether it is worth trying again at once."""
        room = 1 if self.way == STAGED else MAX_UNDER_WAY
        read = next((read for read in self.reads if read.has_more), None)
        if read is None or self.lost is not None or len(self.flights) >= room:
            return False
        piece = read.take_piece()
        try:
            flight = self._begin(read, piece)
        except PeerLost as error:
            read.end_piece(0)
            self.lose(f"a read failed: {error}")
            return False
        except AgentError as error:
            read.end_piece(0)
            self.stop(read, TransferOutcome.FAILED, f"a read failed: {error}")
            return True
        return flight.is_over or len(self.flights) < room

    def _begin(self, read: Read, piece: Piece) -> Flight:
        lists = self.lists[piece.kind]
        if self.way == STAGED:
            self._agent.notify(self.name)  # it must poll fast now, see `NixlReader.tick_s`
            return self._into_stage(read, piece, piece.sizes, lists.peer, piece.peer_ids)
        transfer, is_over = self._agent.begin_read(lists.own, piece.own_ids, lists.peer, piece.peer_ids)
        return self._took_off(Flight(transfer, read, piece, into_stage=False, is_over=is_over))

    def _into_stage(
        self, read: Read, piece: Piece, sizes: Sizes, peer_list: DescriptorList, peer_ids: Indices
    ) -> Flight:
        own_list = self._agent.own_list(stage_rows(self.stage.address, sizes), MemoryKind.HOST)
        try:
            own_ids = np.arange(len(sizes), dtype=np.int32)
            transfer, is_over = self._agent.begin_read(own_list, own_ids, peer_list, peer_ids)
        finally:
            self._agent.release(own_list)
        return self._took_off(Flight(transfer, read, piece, into_stage=True, is_over=is_over))

    def _took_off(self, flight: Flight) -> Flight:
        self.flights.append(flight)
        if flight.is_over:
            self._end(flight, self._arrive(flight))
        return flight

    def _arrive(self, flight: Flight) -> int:
        """Bring what is over to its targets, where it is not there yet and still wanted; returns its bytes."""
        if flight.read is None or flight.piece is None:
            return 0
        if flight.into_stage:
            piece = flight.piece
            try:
                self.stage.copy_out(piece.addresses.tolist(), piece.sizes.tolist(), piece.kind)
            except TransferError as error:
                flight.read.stop(TransferOutcome.FAILED, str(error))
                return 0
        return flight.piece.num_bytes

    def _end(self, flight: Flight, num_bytes: int) -> None:
        self.flights.remove(flight)
        if flight.read is not None:
            flight.read.end_piece(num_bytes)
        with suppress(PeerLost, AgentError):  # of a lost peer; the agent takes the transfer back when it is closed
            self._agent.release(flight.transfer)


def _one_row(address: int, num_bytes: int, device: int) -> Rows:
    return np.array([(address, num_bytes, device, num_bytes, 1)], np.uint64)
