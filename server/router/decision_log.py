"""`--decision-log`: every routing decision with all that it was made from, one JSON object a line.

A record holds numbers and ids, never a prompt. `trtserve replay --decisions` puts the same questions to another policy.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from trtserve.plugins.api import RequestId, Role
from trtserve.plugins.routing_api import Assignment, Estimates, HeldRequest, Plan, RoutingState, WorkerView

logger = logging.getLogger(__name__)

_MOST_HELD = 64
"""Of the held requests, so many are recorded, the oldest, and all that were placed."""

_MOST_WAITING = 10_000
"""Records that wait for the disk; more are dropped, and counted."""


class HeldRecord(msgspec.Struct, frozen=True):
    """A held request as the policy saw it."""

    id: RequestId
    prompt_tokens: int
    max_tokens: int
    held_since_s: float
    overlaps: dict[int, int]  # by slot: leading blocks there


class DecisionRecord(msgspec.Struct, frozen=True):
    """One decision. Times are the server's monotonic clock, seconds."""

    policy: str
    now_s: float
    role: Role
    held: list[HeldRecord]
    workers: Sequence[WorkerView]
    estimates: Estimates
    assignments: Sequence[Assignment]


class DecisionLog:
    """A `DecisionRecorder` that appends to a file, from a thread of its own. Use as a context manager."""

    def __init__(self, path: Path, policy: str) -> None:
        """Raises OSError where the file cannot be opened."""
        self._policy = policy
        self._file = path.open("ab")
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write, name="decision-log", daemon=True)
        self.dropped = 0

    def __enter__(self) -> DecisionLog:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()
        with suppress(OSError):  # what was told already: a file that cannot be written cannot be flushed either
            self._file.close()
        if self.dropped:
            logger.warning("the decision log lacks %d decisions: its disk was too slow", self.dropped)

    def record(self, held: Sequence[HeldRequest], state: RoutingState, plan: Plan) -> None:
        """Encodes at once, since workers' views change; drops the record where the disk does not keep up."""
        sent = {assignment.request_id for assignment in plan.assignments}
        seen = [
            HeldRecord(
                waiting.request.id,
                len(waiting.request.prompt),
                waiting.request.sampling.max_tokens,
                waiting.held_since_s,
                dict(waiting.overlaps()),
            )
            for place, waiting in enumerate(held)
            if place < _MOST_HELD or waiting.request.id in sent
        ]
        role = state.workers[0].role
        record = DecisionRecord(self._policy, state.now_s, role, seen, state.workers, state.estimates, plan.assignments)
        try:
            self._queue.put_nowait(msgspec.json.encode(record))
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        line: bytes | None = b""
        try:
            while (line := self._queue.get()) is not None:
                self._file.write(line + b"\n")
                if self._queue.empty():
                    self._file.flush()
            self._file.flush()
        except OSError:
            logger.exception("the decision log cannot be written any more")
            while line is not None:
                line = self._queue.get()
