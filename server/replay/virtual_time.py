"""asyncio without waiting: when every task waits for a timer, the clock jumps to the first one.

Code that asks `asyncio` or `loop.time()` for the time runs unchanged, and the same way every time. There is nothing but
timers here: a task that waits for a socket, a thread or another process waits for ever, which is an error at once.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_S = 1e6
"""A replay may last so long in virtual time. asyncio takes timers that are a nanosecond apart for one, and that has to
be more than the rounding of a time."""


class Deadlock(RuntimeError):
    """Every task waits, and nothing will ever wake one."""


class _TimersOnly(selectors.SelectSelector):
    """A selector whose descriptors are never ready, and whose waits take no time but move the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock(f"at {self.now_s:.6f} s of virtual time every task waits for something that never comes")
        if timeout > 0:
            # At least to the next number there is, or a very short wait would never be over.
            self.now_s = max(self.now_s + timeout, math.nextafter(self.now_s, math.inf))
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time begins at 0 and passes only while nothing is to be done. Give it to `asyncio.Runner` as
    `loop_factory`.

    What happens at one instant happens in this order: timers; then the tasks that these wake, and what those wake.
    """

    def __init__(self) -> None:
        self._timers = _TimersOnly()
        super().__init__(self._timers)

    def time(self) -> float:
        return self._timers.now_s


class ReportClock:
    """The loop's time, or, while something is reported that happened earlier, the time when it did."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._reported_s: float | None = None

    def __call__(self) -> float:
        """Seconds."""
        return self._loop.time() if self._reported_s is None else self._reported_s

    @contextmanager
    def at(self, time_s: float) -> Iterator[None]:
        """While inside, it is `time_s`."""
        before_s, self._reported_s = self._reported_s, time_s
        try:
            yield
        finally:
            self._reported_s = before_s
