"""The reads under way: cut into pieces that the copy threads take in turn, one piece of every read before the next.

Turns keep each read's deadline and cancel within some milliseconds however long another read is. A read is over once
it was told to stop or has no pieces left, and none of its pieces is being copied any more.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from threading import Condition, Lock, Thread

from trtserve.plugins.transfer.runs import Run, bytes_of, cut_pieces
from trtserve.plugins.transfer.shm.copying import copy_piece
from trtserve.plugins.transfer_api import Completion, TransferId, TransferOutcome

PIECE_BYTES = 4 << 20  # so that two threads share a read of 16 MiB evenly

# A memmove of much more than the cache goes past it, which saves reading the target first: 11 instead of 7 GB/s where
# this was measured. From where on is libc's choice (glibc: x86_non_temporal_threshold, 99 MiB there, mostly less).
LONG_RUN_BYTES = 32 << 20
LONG_PIECE_BYTES = 128 << 20


class Read:
    """One read; once in a `ReadQueue`, it is touched under the queue's lock only."""

    def __init__(self, transfer_id: TransferId, peer: object, runs: list[Run], deadline_s: float) -> None:
        self.transfer_id = transfer_id
        self.peer = peer
        self.pieces_in_copy = 0
        self._begun_s = time.monotonic()
        self._until_s = self._begun_s + deadline_s
        self._num_bytes = bytes_of(runs)
        self._taken_bytes = 0
        self._copied_bytes = 0
        has_long_runs = self._num_bytes >= LONG_RUN_BYTES * max(1, len(runs))
        piece_bytes = LONG_PIECE_BYTES if has_long_runs else PIECE_BYTES
        self._pieces: Iterator[list[Run]] = cut_pieces(runs, piece_bytes)
        self._stopped: tuple[TransferOutcome, str] | None = None

    def stop(self, outcome: TransferOutcome, reason: str) -> None:
        """Give no more pieces; the first reason counts."""
        self._stopped = self._stopped or (outcome, reason)

    def begin_piece(self) -> list[Run] | None:
        """The next piece to copy; None when there is none, be it for the deadline."""
        if not self._has_more:
            return None
        if time.monotonic() >= self._until_s:
            self.stop(TransferOutcome.TIMED_OUT, f"{self._copied_bytes} of {self._num_bytes} bytes copied in time")
            return None
        piece = next(self._pieces)
        self._taken_bytes += bytes_of(piece)
        self.pieces_in_copy += 1
        return piece

    def end_piece(self, num_bytes: int) -> None:
        self.pieces_in_copy -= 1
        self._copied_bytes += num_bytes

    @property
    def is_over(self) -> bool:
        return self.pieces_in_copy == 0 and not self._has_more

    @property
    def _has_more(self) -> bool:
        return self._stopped is None and self._taken_bytes < self._num_bytes

    def completion(self) -> Completion:
        outcome, reason = self._stopped or (TransferOutcome.DONE, "")
        return Completion(self.transfer_id, outcome, self._copied_bytes, time.monotonic() - self._begun_s, reason)


class ReadQueue:
    """Reads, the threads that carry them out, and the completions."""

    def __init__(self, num_threads: int) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable while there are completions
        self._lock = Lock()
        self._has_turns = Condition(self._lock)  # for the threads
        self._has_ended = Condition(self._lock)  # for `stop_all_of`
        self._active: dict[TransferId, Read] = {}
        self._turns: deque[Read] = deque()  # reads that may have pieces left
        self._completions: list[Completion] = []
        self._is_closed = False
        self._threads = [
            Thread(target=self._work, name=f"shm-copy-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_active(self) -> int:
        return len(self._active)

    def add(self, read: Read, *, is_small: bool = False) -> None:
        """Begin a read. The threads are not woken for a small one, which the caller will `help` to its end."""
        with self._lock:
            self._active[read.transfer_id] = read
            self._turns.append(read)
            if not is_small:
                self._has_turns.notify_all()

    def help(self, read: Read, for_s: float) -> None:
        """Copy pieces of this read on the calling thread, for so long or until there are none left. On a busy machine
        the caller has a core already, and the threads have to wait for one."""
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            with self._lock:
                piece = read.begin_piece()
                self._end_if_over(read)
            if piece is None:
                return
            self._copy(read, piece)

    def stop(self, transfer_id: TransferId, outcome: TransferOutcome, reason: str) -> bool:
        """Start no more pieces of this read. Whether none of it is being copied any more."""
        with self._lock:
            read = self._active.get(transfer_id)
            if read is None:
                return True
            read.stop(outcome, reason)
            self._end_if_over(read)
            return read.pieces_in_copy == 0

    def stop_all_of(self, peer: object, reason: str) -> None:
        """End all reads of a peer as lost, and wait for the pieces being copied: some ten milliseconds at most."""
        with self._lock:
            reads = [read for read in self._active.values() if read.peer is peer]
            for read in reads:
                read.stop(TransferOutcome.PEER_LOST, reason)
                self._end_if_over(read)
            self._has_ended.wait_for(lambda: not any(read.pieces_in_copy for read in reads))

    def collect(self) -> list[Completion]:
        """The completions since the last call."""
        with self._lock:
            completions, self._completions = self._completions, []
            if completions:
                os.eventfd_read(self.event_fd)
            return completions

    def close(self) -> None:
        """Start no more pieces, and wait for those being copied. Nothing may be called after it."""
        with self._lock:
            self._is_closed = True
            self._has_turns.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self.event_fd)

    def _work(self) -> None:
        while (work := self._take()) is not None:
            self._copy(*work)

    def _copy(self, read: Read, piece: list[Run]) -> None:
        copied_bytes, failure = 0, ""
        try:
            copy_piece(piece)
            copied_bytes = bytes_of(piece)
        except Exception as error:  # out of memory: the read fails, the thread goes on
            failure = f"copying failed: {error!r}"
        with self._lock:
            if failure:
                read.stop(TransferOutcome.FAILED, failure)
            read.end_piece(copied_bytes)
            self._end_if_over(read)

    def _take(self) -> tuple[Read, list[Run]] | None:
        """The next piece, of the read whose turn it is; waits for one; None when closed."""
        with self._lock:
            while not self._is_closed:
                if not self._turns:
                    self._has_turns.wait()
                    continue
                read = self._turns.popleft()
                piece = read.begin_piece()
                if piece is not None:
                    self._turns.append(read)
                    return read, piece
                self._end_if_over(read)
            return None

    def _end_if_over(self, read: Read) -> None:
        if not read.is_over or self._active.pop(read.transfer_id, None) is None:
            return
        if read in self._turns:
            self._turns.remove(read)
        self._completions.append(read.completion())
        os.eventfd_write(self.event_fd, 1)
        self._has_ended.notify_all()
