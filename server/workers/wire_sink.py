"""From the engine's threads to the thread that owns the worker's socket: messages are numbered, packed and queued."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from trtserve.plugins.api import StepOutputs, WorkerLoad
from trtserve.server.workers import wire
from trtserve.server.workers.block_mirror import BlockMirror
from trtserve.server.workers.plain_steps import PlainSteps, is_plain
from trtserve.server.workers.ranks import total_load
from trtserve.server.workers.warm_up import WarmUpWatch

logger = logging.getLogger(__name__)

OUTBOX_LIMIT = 10_000
_LONGEST_WAIT_S = 60.0

_MOST_IN_BATCH = 64
_MOST_BATCH_BYTES = 2**18
"""Several messages that wait go as one, which the server receives at once: it would be busy with receiving from an
engine whose steps are quick. Bounded, so that no batch holds up what comes behind it."""


class OutboxFull(Exception):
    """The server has read nothing for a minute."""


class Outbox:
    """Encoded messages on their way from engine threads to the thread that owns the socket.

    A message is made while nobody else can queue one, so what messages say about changing state comes in the order
    in which it changed. Bounded: when the server does not read, the engine waits, for at most a minute, and then
    counts as broken.
    """

    def __init__(self, limit: int = OUTBOX_LIMIT) -> None:
        self._limit = limit
        self._messages: deque[bytes | PlainSteps] = deque()  # the latter are encoded when they are taken
        self._has_room = threading.Condition()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._messages)

    @property
    def last(self) -> bytes | PlainSteps | None:
        """The last message that waits. For `make` functions."""
        return self._messages[-1] if self._messages else None

    def put(self, make: Callable[[], wire.FromWorker | PlainSteps | None]) -> None:
        """Wait for room, then make a message and queue it; None: it was added to `last`. Raises OutboxFull."""
        with self._has_room:
            self._wait_for_room()
            made = make()
            if made is None:
                return
            self._messages.append(made if isinstance(made, PlainSteps) else wire.encode(made))
        os.eventfd_write(self.descriptor, 1)

    def put_at_once(self, make: Callable[[], wire.FromWorker]) -> None:
        """`put` beyond the limit: for the thread that calls `take`, which would wait for itself, and for last words."""
        with self._has_room:
            self._messages.append(wire.encode(make()))
        os.eventfd_write(self.descriptor, 1)

    def take(self) -> bytes | None:
        """What waits, as one message for the socket: the next one, with those behind it up to a limit. None if there is
        nothing."""
        with self._has_room:
            messages = self._messages
            if not messages:
                return None
            taken: list[bytes] = []
            num_bytes = 0
            while messages and len(taken) < _MOST_IN_BATCH:
                first = messages[0]
                data = messages[0] = first if isinstance(first, bytes) else wire.encode(first.message())
                num_bytes += len(data)
                if taken and num_bytes > _MOST_BATCH_BYTES:
                    break
                taken.append(data)
                messages.popleft()
            self._has_room.notify(len(taken))
        return wire.batch_of(taken)

    def _wait_for_room(self) -> None:
        if len(self._messages) >= self._limit and not self._has_room.wait_for(
            lambda: len(self._messages) < self._limit, _LONGEST_WAIT_S
        ):
            raise OutboxFull(f"the server has not read its messages for {_LONGEST_WAIT_S:.0f} s")

    def reset(self) -> None:
        """Call before taking: later puts wake the poller again."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)


class WireSink:
    """The EngineSink of a worker: packs each step in the engine's thread, and remembers which blocks are stored."""

    def __init__(
        self, outbox: Outbox, warm_up: WarmUpWatch, after_step: Callable[[StepOutputs], None] | None = None
    ) -> None:
        """after_step: called with each step, in the engine's thread, once its message is queued."""
        self._outbox = outbox
        self._warm_up = warm_up
        self._after_step = after_step
        self._mirrors = {0: BlockMirror()}  # by rank
        self._loads = {0: WorkerLoad()}
        self.steps = 0
        self.failed = threading.Event()

    @property
    def load(self) -> WorkerLoad:
        """Of all ranks together, after the last step of each."""
        return total_load(self._loads)

    def push(self, step: StepOutputs) -> None:
        self._outbox.put(lambda: self._next_step(step))
        if self._after_step is not None:
            self._after_step(step)
        # Only now: Ready, which the end of the warm-up brings about, comes after the warm-up's last step.
        self._warm_up.see(step)

    def _next_step(self, step: StepOutputs) -> wire.Step | PlainSteps | None:
        self.steps += 1
        self._loads[step.rank] = step.load
        mirror = self._mirrors.get(step.rank)
        if mirror is None:
            mirror = self._mirrors[step.rank] = BlockMirror()
        message = wire.step_of(self.steps, mirror.apply(step.events), step)
        if not is_plain(message):
            return message
        last = self._outbox.last
        if isinstance(last, PlainSteps) and last.join(message):
            return None
        return PlainSteps(message)

    def push_blocks(self) -> None:
        """Queue the whole set of stored blocks, right behind the steps that it includes. For the socket's thread."""
        for rank, mirror in sorted(self._mirrors.items()):
            self._outbox.put_at_once(partial(mirror.snapshot, rank))

    def fail(self, error: BaseException) -> None:
        if self.failed.is_set():
            return
        logger.error("the engine failed", exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        self._outbox.put_at_once(partial(self._last_words, reason))
        self._warm_up.give_up(reason)

    def _last_words(self, reason: str) -> wire.Failed:
        # While nobody can take: who sees `failed`, sends what is left and ends the process, sends this as well.
        self.failed.set()
        return wire.Failed(reason)

    def progress(self, phase: str) -> None:
        logger.info("%s", phase)
        self._outbox.put(lambda: wire.Progress(phase))
