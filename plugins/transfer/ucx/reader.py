"""Moves all reads of one worker on: the loop of progress, posting and arming that `poll` runs a slice of."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from time import monotonic

from trtserve.plugins.transfer.ucx.endpoint import Endpoint, ErrorLog
from trtserve.plugins.transfer.ucx.peer import UcxPeer
from trtserve.plugins.transfer.ucx.read import Gets, Read
from trtserve.plugins.transfer.ucx.worker import UcxWorker
from trtserve.plugins.transfer_api import (
    Cancelled,
    Completion,
    PeerInfo,
    Region,
    TransferId,
    TransferOutcome,
)

SLICE_S = 0.004
"""How long one turn goes on while there is more to do."""

_MAX_TICK_S = 0.02  # between turns while reads are under way; the descriptor wakes far sooner
_MIN_TICK_S = 0.001
_CLOSE_S = 0.5  # for gets that are under way, and again for endpoints
_OVERDUE_S = 1.0  # past a probe's deadline


class UcxReader:
    """Owns the peers and their reads, not the worker. Every peer's end is found by `turn`."""

    def __init__(self, worker: UcxWorker) -> None:
        self._worker = worker
        self._errors = ErrorLog()
        self._peers: dict[int, UcxPeer] = {}  # by key; also those that are being closed
        self._reads: dict[TransferId, tuple[UcxPeer, Read]] = {}
        self._completions: list[Completion] = []
        self._keys = count(1)
        self._transfer_ids = count(1)

    def connect(
        self, info: PeerInfo, address: bytes, regions: Mapping[str, Region], packed_rkeys: Sequence[bytes]
    ) -> UcxPeer:
        """A peer whose connection is under way. packed_rkeys: in the order of `regions`. Raises UcxError."""
        key = next(self._keys)
        peer = UcxPeer(info, key, Endpoint(self._worker, address, key, self._errors), regions)
        self._peers[key] = peer
        try:
            for name, packed in zip(regions, packed_rkeys, strict=True):
                peer.rkeys[name] = peer.endpoint.unpack_rkey(packed)
        except BaseException:
            self.drop(peer, "its keys do not fit")
            raise
        return peer

    def begin(self, peer: UcxPeer, gets: Iterator[Gets], deadline_s: float) -> TransferId:
        """Post what there is room for. deadline_s: from now."""
        now_s = monotonic()
        transfer_id = TransferId(next(self._transfer_ids))
        read = Read(self._worker.library, transfer_id, gets, now_s, now_s + deadline_s)
        self._reads[transfer_id] = (peer, read)
        peer.add(read)
        self._advance(peer, now_s)
        self._worker.signal()
        return transfer_id

    def run(self, peer: UcxPeer, gets: Iterator[Gets], deadline_s: float) -> Completion:
        """A read to its end, which no `take_completions` tells; others move on meanwhile. Blocks."""
        transfer_id = self.begin(peer, gets, deadline_s)
        waiting = self._waiting()
        until_s = monotonic() + deadline_s + _OVERDUE_S
        while monotonic() < until_s:
            self.turn()
            for completion in self._completions:
                if completion.transfer_id == transfer_id:
                    self._completions.remove(completion)
                    self._worker.signal()  # for the turns of others
                    return completion
            waiting.poll(self.tick_s() * 1e3)
        raise TimeoutError(f"a read went on {_OVERDUE_S} s past its deadline")

    def turn(self) -> None:
        """Move everything on until nothing is left to do now, or for a slice of time. Leaves the event descriptor
        armed, or readable where there is more to do."""
        until_s = monotonic() + SLICE_S
        while True:
            moved = self._worker.progress()
            now_s = monotonic()
            self._look_for_errors()
            for peer in tuple(self._peers.values()):
                self._advance(peer, now_s)
            if not moved and self._worker.arm():
                return
            if now_s >= until_s:
                self._worker.signal()
                return

    def take_completions(self) -> list[Completion]:
        """What ended since the last call."""
        completions, self._completions = self._completions, []
        return completions

    def tick_s(self) -> float:
        """How long `turn` may stay uncalled while the descriptor is quiet; 0: for ever."""
        if not self._reads and all(peer.lost is None for peer in self._peers.values()):
            return 0.0
        now_s = monotonic()
        due_s = min((peer.due_s(now_s) for peer in self._peers.values()), default=now_s)
        return min(max(due_s - now_s, _MIN_TICK_S), _MAX_TICK_S)

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        """See `KVTransfer.cancel`."""
        if transfer_id not in self._reads:
            return Cancelled.STOPPED
        peer, read = self._reads[transfer_id]
        read.stop(TransferOutcome.CANCELLED, "cancelled")
        self._advance(peer, monotonic())
        self._worker.signal()
        return Cancelled.DRAINING if transfer_id in self._reads else Cancelled.STOPPED

    def drop(self, peer: UcxPeer, reason: str) -> None:
        """Close the connection and end the peer's reads; idempotent."""
        peer.lose(reason)
        self._advance(peer, monotonic())
        self._worker.signal()

    def close(self) -> None:
        """Drop every peer, after the gets that are under way; nobody hears of their ends.

        They are waited for because a peer's UCX that answers a get over TCP into a connection that was reset aborts
        its process (seen with 1.22).
        """
        for _, read in self._reads.values():
            read.stop(TransferOutcome.CANCELLED, "the transfer was closed")
        self._turn_until(lambda: not self._reads)
        for peer in tuple(self._peers.values()):
            self.drop(peer, "the transfer was closed")
        self._turn_until(lambda: not self._peers)
        self._completions.clear()

    def _turn_until(self, is_done: Callable[[], bool]) -> None:
        until_s = monotonic() + _CLOSE_S
        waiting = self._waiting()
        while not is_done() and monotonic() < until_s:
            self.turn()
            if not is_done():
                waiting.poll(self.tick_s() * 1e3)

    def _waiting(self) -> select.poll:
        waiting = select.poll()
        waiting.register(self._worker.event_fd, select.POLLIN)
        return waiting

    def _look_for_errors(self) -> None:
        while self._errors.statuses:
            key, status = self._errors.statuses.popitem()
            if key in self._peers:
                self._peers[key].lose(f"the connection failed: {self._worker.library.describe(status)}")

    def _advance(self, peer: UcxPeer, now_s: float) -> None:
        for read in peer.advance(now_s):
            del self._reads[read.id]
            self._completions.append(read.completion(now_s))
        if peer.is_gone and self._peers.pop(peer.key, None) is not None:
            peer.endpoint.free()
