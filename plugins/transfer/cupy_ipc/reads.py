"""Reads under way: each is queued on the GPU as a whole, and over when the event behind it has come.

The GPU copies many GB in the time of a deadline, and what is queued cannot be taken back: so a read that is cancelled,
too late or whose peer is dropped still ends only when its event comes, with that outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from trtserve.plugins.transfer.cupy_ipc.device import Device, DeviceError, Event
from trtserve.plugins.transfer.cupy_ipc.gather import gather_of, suits_copy_engines
from trtserve.plugins.transfer.cupy_ipc.peer import CupyPeer
from trtserve.plugins.transfer.runs import merge_runs
from trtserve.plugins.transfer_api import (
    Cancelled,
    Completion,
    ReadPlan,
    Region,
    TransferId,
    TransferOutcome,
)

READING_TICK_S = 0.0005
_SPIN_S = 0.0002  # most reads are over sooner than a poll of this process comes round
_SPIN_BYTES = 64 << 20


@dataclass(slots=True, eq=False)
class Read:
    """One read under way, over when its event has come."""

    transfer_id: TransferId
    peer: CupyPeer
    num_bytes: int
    begun_s: float
    until_s: float
    event: Event | None  # None: nothing was queued, or CUDA refused
    keep: list[object]  # what the queued copies still use
    outcome: TransferOutcome = TransferOutcome.DONE
    reason: str = ""

    def end_as(self, outcome: TransferOutcome, reason: str) -> None:
        """The first reason to end early is the one that is told."""
        if self.outcome is TransferOutcome.DONE:
            self.outcome, self.reason = outcome, reason


class Reads:
    """All reads of one transfer. `clock`: seconds, monotonic."""

    def __init__(self, device: Device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._active: dict[TransferId, Read] = {}
        self._completions: list[Completion] = []
        self._transfer_ids = count(1)

    def __len__(self) -> int:
        return len(self._active)

    def begin(
        self, peer: CupyPeer, plan: ReadPlan, own: dict[str, Region], num_bytes: int, deadline_s: float
    ) -> TransferId:
        """Queue a plan that was checked."""
        now_s = self._clock()
        read = Read(TransferId(next(self._transfer_ids)), peer, num_bytes, now_s, now_s + deadline_s, None, [])
        if num_bytes:
            self._queue(read, plan, own)
        self._active[read.transfer_id] = read
        peer.num_reads += 1
        self._look_at_deadline(read)  # passed already: the GPU has had no time for it
        if read.event is not None and num_bytes <= _SPIN_BYTES:
            self._spin(read)
        return read.transfer_id

    def turn(self) -> list[Completion]:
        """What has ended since the last call."""
        now_s = self._clock()
        for read in list(self._active.values()):
            if self._is_over(read):
                self._end(read, now_s)  # in time or not: a process that was late itself may only see it now
            else:
                self._look_at_deadline(read)
        ended, self._completions = self._completions, []
        return ended

    def cancel(self, transfer_id: TransferId) -> Cancelled:
        read = self._active.get(transfer_id)
        if read is None:
            return Cancelled.STOPPED
        if self._is_over(read):
            self._end(read, self._clock())
            return Cancelled.STOPPED
        read.end_as(TransferOutcome.CANCELLED, "cancelled")
        return Cancelled.DRAINING

    def drop(self, peer: CupyPeer) -> None:
        """End its reads; its memory is closed when the last of them is over."""
        peer.is_dropped = True
        for read in self._active.values():
            if read.peer is peer:
                read.end_as(TransferOutcome.PEER_LOST, "the peer was dropped")
        if not peer.num_reads:
            peer.close(self._device)

    def _look_at_deadline(self, read: Read) -> None:
        if self._clock() > read.until_s:
            read.end_as(TransferOutcome.TIMED_OUT, "the GPU did not end the copies in time")

    def _queue(self, read: Read, plan: ReadPlan, own: dict[str, Region]) -> None:
        try:
            for copies in plan.copies:
                if not copies.targets:
                    continue
                here, there = own[copies.region], read.peer.regions[copies.region]
                if suits_copy_engines(copies, here, there):
                    self._device.copy(merge_runs(ReadPlan([copies]), own, read.peer.regions))
                else:
                    read.keep.append(self._device.gather(gather_of(copies, here, there)))
            read.event = self._device.mark()
        except DeviceError as error:
            read.end_as(TransferOutcome.FAILED, str(error))
            read.event = self._mark_what_was_queued()

    def _mark_what_was_queued(self) -> Event | None:
        try:
            return self._device.mark()
        except DeviceError:
            return None  # the context is broken: nothing runs in it any more

    def _spin(self, read: Read) -> None:
        until_s = self._clock() + _SPIN_S
        while not self._is_over(read) and self._clock() < until_s:
            pass

    def _is_over(self, read: Read) -> bool:
        if read.event is None:
            return True
        try:
            return self._device.has_come(read.event)
        except DeviceError as error:
            read.end_as(TransferOutcome.FAILED, str(error))
            return True

    def _end(self, read: Read, now_s: float) -> None:
        del self._active[read.transfer_id]
        num_bytes = read.num_bytes if read.outcome is TransferOutcome.DONE else 0
        self._completions.append(
            Completion(read.transfer_id, read.outcome, num_bytes, now_s - read.begun_s, read.reason)
        )
        read.peer.num_reads -= 1
        if read.peer.is_dropped and not read.peer.num_reads:
            read.peer.close(self._device)
