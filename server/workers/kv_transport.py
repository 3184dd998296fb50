"""The thread that makes every call to a worker's KV transfers, and its timers.

A transfer may copy for some milliseconds inside a call, and an import blocks; so neither the engine's thread nor the
socket's makes them. Of one peer at most `MAX_READS` reads are under way at once, and the others wait for their turn:
what a read may take is reckoned from the whole bandwidth, and a peer that hangs holds up its own reads only.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from trtserve.plugins.transfer_api import (
    Completion,
    KVTransfer,
    Peer,
    ReadPlan,
    TransferId,
    TransferOutcome,
)

logger = logging.getLogger(__name__)

MAX_READS = 2
TICK_S = 0.25
"""How often the timers are looked at."""

_GRACE_S = 1.0  # that a transfer may be late with the end of a read, before it is cancelled from here
_LONGEST_READ_S = 30.0
_CLOSE_S = 10.0

_Result = TypeVar("_Result")


def read_deadline_s(num_bytes: int, bandwidth_bytes_per_s: float) -> float:
    """How long a read may take, by what the probe of the peer measured: ten times as long as it should, and 2 s."""
    if bandwidth_bytes_per_s <= 0:
        return _LONGEST_READ_S
    return min(2.0 + num_bytes / (0.1 * bandwidth_bytes_per_s), _LONGEST_READ_S)


@dataclass(slots=True, eq=False)
class Read:
    """One read of one peer. `ended` is called once on the transport's thread, and from then on nothing writes to the
    targets; `overdue` before it, where the end is late."""

    transfer: KVTransfer
    peer: Peer
    plan: ReadPlan
    deadline_s: float
    ended: Callable[[Completion], None]
    overdue: Callable[[], None]
    transfer_id: TransferId | None = None  # None: it waits for its turn
    late_s: float = math.inf  # on the monotonic clock


class TransportThread:
    """Owns the transfers that it is given (`add`) until `close`. `post`, `call` and `close` are for other threads, all
    else is for functions that run on this one.

    clock: seconds, monotonic; for deadlines.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._inbox: deque[Callable[[], object]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._transfers: list[KVTransfer] = []
        self._timers: list[Callable[[], object]] = []
        self._poller = select.poll()
        self._poller.register(self._wakeup, select.POLLIN)
        self._waiting: deque[Read] = deque()
        self._active: dict[tuple[str, TransferId], Read] = {}
        self._next_tick_s = 0.0
        self._is_closed = False
        self._lock = threading.Lock()  # over the descriptor's end
        self._thread = threading.Thread(target=self._run, name="kv-transport", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- from other threads

    def post(self, function: Callable[[], object]) -> None:
        """Run it on the thread soon; those posted by one thread run in their order. After `close` nothing happens."""
        self._inbox.append(function)
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._wakeup, 1)

    def call(self, function: Callable[[], _Result], timeout_s: float) -> _Result:
        """Run it on the thread and wait for what it gives or raises. Raises TimeoutError."""
        future: Future[_Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future.result(timeout_s)

    def close(self) -> None:
        """Close the transfers and end the thread; reads under way end without a word. Idempotent, bounded in time."""
        if not self._is_closed:
            self.post(self._close)
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                logger.warning("the KV transfers did not close within %.0f s", _CLOSE_S)

    # -------------------------------------------------------------- on the thread

    def add(self, transfer: KVTransfer) -> None:
        """Poll this transfer from now on; it has been opened on this thread."""
        self._transfers.append(transfer)
        descriptor = transfer.wakeup_fd()
        if descriptor is not None:
            self._poller.register(descriptor, select.POLLIN)

    def every_tick(self, function: Callable[[], object]) -> None:
        """Call it about every TICK_S."""
        self._timers.append(function)

    def read(self, read: Read) -> None:
        """Begin it, or have it wait for its turn."""
        self._waiting.append(read)
        self._start_waiting()

    def cancel(self, read: Read) -> None:
        """End a read early; `ended` is still called, perhaps before this returns."""
        if read.transfer_id is not None:
            read.transfer.cancel(read.transfer_id)
        elif read in self._waiting:
            self._waiting.remove(read)
            read.ended(_never_begun(TransferOutcome.CANCELLED, "cancelled"))

    def drop_peer(self, transfer: KVTransfer, peer: Peer) -> None:
        """Forget a peer; all its reads end."""
        # The end of one read may cancel others that wait here, and begin none: this peer is not found any more.
        while (read := next((read for read in self._waiting if read.peer is peer), None)) is not None:
            self._waiting.remove(read)
            self._guarded(partial(read.ended, _never_begun(TransferOutcome.PEER_LOST, "the peer is gone")))
        transfer.drop_peer(peer)

    def _run(self) -> None:
        while not self._is_closed:
            self._poller.poll(1000 * self._timeout_s())
            with suppress(BlockingIOError):
                os.eventfd_read(self._wakeup)
            while self._inbox and not self._is_closed:
                self._guarded(self._inbox.popleft())
            self._guarded(self._collect)
            if time.monotonic() >= self._next_tick_s:
                self._next_tick_s = time.monotonic() + TICK_S
                self._guarded(self._cancel_late)
                for timer in self._timers:
                    self._guarded(timer)

    def _guarded(self, function: Callable[[], object]) -> None:
        # An edge of the program: a transfer is a plugin's code, and the hand-over must not end with one of its bugs.
        try:
            function()
        except Exception:
            # Not the function itself: what is bound to it has prompts.
            logger.exception("the KV transport failed at %s", getattr(function, "func", function).__qualname__)

    def _timeout_s(self) -> float:
        ticks = (transfer.tick_s() for transfer in self._transfers)
        return min([TICK_S, *(tick_s for tick_s in ticks if tick_s > 0)])

    def _collect(self) -> None:
        for transfer in self._transfers:
            for completion in transfer.poll():
                read = self._active.pop((transfer.name, completion.transfer_id), None)
                if read is not None:
                    self._guarded(partial(read.ended, completion))
        if self._waiting:
            self._start_waiting()

    def _start_waiting(self) -> None:
        while (read := self._next_turn()) is not None:
            self._waiting.remove(read)
            self._start(read)

    def _next_turn(self) -> Read | None:
        num_active = Counter(id(read.peer) for read in self._active.values())
        return next((read for read in self._waiting if num_active[id(read.peer)] < MAX_READS), None)

    def _start(self, read: Read) -> None:
        try:
            transfer_id = read.transfer.read_blocks(read.peer, read.plan, read.deadline_s)
        except Exception as error:  # by contract ValueError alone; whatever it is, nothing was copied
            logger.exception("%s did not begin a read", read.transfer.name)
            read.ended(_never_begun(TransferOutcome.FAILED, f"{type(error).__name__}: {error}"))
            return
        read.transfer_id = transfer_id
        read.late_s = self._clock() + read.deadline_s + _GRACE_S
        self._active[read.transfer.name, transfer_id] = read

    def _cancel_late(self) -> None:
        now_s = self._clock()
        for read in list(self._active.values()):
            if now_s > read.late_s and read.transfer_id is not None:
                read.late_s = math.inf
                logger.warning("%s is late with a read from %s", read.transfer.name, read.peer.info.worker_id)
                read.transfer.cancel(read.transfer_id)
                read.overdue()

    def _close(self) -> None:
        with self._lock:
            self._is_closed = True
            os.close(self._wakeup)
        for transfer in self._transfers:
            self._guarded(transfer.close)


def _never_begun(outcome: TransferOutcome, reason: str) -> Completion:
    return Completion(TransferId(0), outcome, 0, 0.0, reason)
