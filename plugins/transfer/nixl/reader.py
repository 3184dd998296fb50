"""Moves all reads of one worker on: the loop of progress, posting and ending that `poll` runs a slice of."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from time import monotonic

from trtserve.plugins.transfer.export import Export
from trtserve.plugins.transfer.nixl.agent import Agent, AgentError, PeerLost
from trtserve.plugins.transfer.nixl.layout import Piece
from trtserve.plugins.transfer.nixl.peer import NixlPeer
from trtserve.plugins.transfer.nixl.read import Read
from trtserve.plugins.transfer.nixl.stage import Stages
from trtserve.plugins.transfer_api import Cancelled, Completion, PeerInfo, TransferError, TransferId, TransferOutcome

SLICE_S = 0.004
"""How long one turn goes on while there is more to do."""

MAX_READS = 4096

_READING_TICK_S = 0.0002  # while reads are under way, here or, as a peer has told, from here
_EXPECTING_TICK_S = 0.001  # for a while after an export, which is made for somebody who will connect
_IDLE_TICK_S = 0.02  # a first contact takes some of these
_READ_FROM_S = 1.0  # past a notification, which comes with every piece
_EXPECTING_S = 5.0

_CLOSE_S = 1.0
"""How long `close` waits for what is under way. Over TCP a target that answers to a closed connection may be aborted by
UCX; one that hangs is not waited for any longer."""

_log = logging.getLogger(__name__)


class NixlReader:
    """Owns the peers and their reads, not the agent. `event_fd` is readable while `turn` has something to do that does
    not wait for a peer; whatever does is found by calling `turn` every `tick_s`."""

    def __init__(self, agent: Agent) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stages = Stages(agent)
        self._agent = agent
        self._peers: dict[str, NixlPeer] = {}  # by agent name; also lost ones of which something is under way
        self._reads: dict[TransferId, NixlPeer] = {}
        self._completions: list[Completion] = []
        self._transfer_ids = count(1)
        self._is_signalled = False
        self._expecting_until_s = self._read_from_until_s = 0.0

    def connect(self, info: PeerInfo, name: str, export: Export, metadata: bytes) -> NixlPeer:
        """A peer that is loaded, to be probed. name: that its agent must have. Raises TransferError."""
        self._make_way(info, name)
        try:
            loaded = self._agent.add_peer(metadata)
        except (PeerLost, AgentError) as error:
            raise TransferError(f"no connection to worker {info.worker_id}: {error}; is it alive?") from None
        if loaded != name:
            if loaded not in self._peers:
                self._remove(loaded)
            raise TransferError(f"the metadata of worker {info.worker_id} is that of NIXL's agent {loaded!r}")
        try:
            stage = self.stages.take()
        except TransferError:
            self._remove(name)
            raise
        self._peers[name] = NixlPeer(info, name, self._agent, export.regions, stage)
        return self._peers[name]

    def begin(self, peer: NixlPeer, pieces: Iterator[Piece], deadline_s: float) -> TransferId:
        """Post the first piece. deadline_s: from now."""
        now_s = monotonic()
        transfer_id = TransferId(next(self._transfer_ids))
        read = Read(transfer_id, pieces, now_s, now_s + deadline_s)
        if len(self._reads) >= MAX_READS:
            read.stop(TransferOutcome.FAILED, f"{MAX_READS} reads are under way already")
        self._reads[transfer_id] = peer
        peer.add(read)
        self._advance(peer, now_s)
        self._signal()
        return transfer_id

    def turn(self) -> None:
        """Progress, then pieces until none can be posted, or for a slice of time."""
        self._clear_signal()
        until_s = monotonic() + SLICE_S
        if self._progress():
            self._read_from_until_s = monotonic() + _READ_FROM_S
        while True:
            more = [self._advance(peer, monotonic()) for peer in tuple(self._peers.values())]
            if not any(more):
                return
            if monotonic() >= until_s:
                self._signal()
                return

    def take_completions(self) -> list[Completion]:
        """What ended since the last call."""
        completions, self._completions = self._completions, []
        return completions

    def tick_s(self) -> float:
        """How long `turn` may stay uncalled while the descriptor is quiet."""
        now_s = monotonic()
        if self._reads or now_s < self._read_from_until_s:
            return _READING_TICK_S
        return _EXPECTING_TICK_S if now_s < self._expecting_until_s else _IDLE_TICK_S

    def expect(self) -> None:
        """Somebody is about to connect."""
        self._expecting_until_s = monotonic() + _EXPECTING_S

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        """See `KVTransfer.cancel`."""
        peer = self._reads.get(transfer_id)
        if peer is None:
            return Cancelled.STOPPED
        for read in peer.reads:
            if read.id == transfer_id:
                peer.stop(read, TransferOutcome.CANCELLED, "cancelled")
        self._collect(peer)
        return Cancelled.DRAINING if transfer_id in self._reads else Cancelled.STOPPED

    def drop(self, peer: NixlPeer, reason: str) -> None:
        """Give the connection back as soon as nothing is under way any more, and end the peer's reads; idempotent."""
        peer.lose(reason)
        self._collect(peer)

    def close(self) -> None:
        """Forget every peer; the agent's `close` must follow, which stops what is under way. Nobody hears of ends."""
        for peer in tuple(self._peers.values()):
            self.drop(peer, "the transfer was closed")
        until_s = time.monotonic() + _CLOSE_S
        while self._peers and time.monotonic() < until_s:
            self.turn()
            time.sleep(_READING_TICK_S)
        for peer in self._peers.values():
            peer.release_lists()
            peer.abandon()
        self._peers.clear()
        self._reads.clear()
        self._completions.clear()
        os.close(self.event_fd)

    def _make_way(self, info: PeerInfo, name: str) -> None:
        """Let a peer's new connection take the name of an earlier one."""
        earlier = self._peers.get(name)
        if earlier is None:
            return
        if earlier.lost is None:
            raise TransferError(f"worker {info.worker_id} is imported already; drop_peer comes first")
        if not earlier.is_quiet:
            raise TransferError(f"a read of worker {info.worker_id} is still under way from before it was dropped")
        earlier.abandon()  # its stage is never used again
        self._forget(earlier)

    def _advance(self, peer: NixlPeer, now_s: float) -> bool:
        has_more = peer.advance(now_s)
        self._collect(peer)
        return has_more

    def _collect(self, peer: NixlPeer) -> None:
        now_s = monotonic()
        for read in peer.take_ended():
            del self._reads[read.id]
            self._completions.append(read.completion(now_s))
            self._signal()
        if peer.is_gone and self._peers.get(peer.name) is peer:
            self._forget(peer)
            self.stages.give_back(peer.stage)

    def _forget(self, peer: NixlPeer) -> None:
        peer.release_lists()
        del self._peers[peer.name]
        self._remove(peer.name)

    def _remove(self, name: str) -> None:
        with suppress(PeerLost, AgentError):  # the peer is gone, and so is what was to be removed
            self._agent.remove_peer(name)

    def _progress(self) -> bool:
        try:
            return self._agent.progress()
        except (PeerLost, AgentError) as error:
            _log.warning("NIXL makes no progress: %s", error)
            return False

    def _signal(self) -> None:
        if not self._is_signalled:
            self._is_signalled = True
            os.eventfd_write(self.event_fd, 1)

    def _clear_signal(self) -> None:
        if self._is_signalled:
            self._is_signalled = False
            os.eventfd_read(self.event_fd)
