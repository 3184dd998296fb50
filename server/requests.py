"""The requests being answered: so that one can be cancelled by its id, and the server knows when it is idle."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from trtserve.plugins.api import RequestId
from trtserve.server.errors import Overloaded, RequestTimedOut, ServeError


class LiveRequest:
    """One HTTP request that generates. Cancelling it cancels the task that answers it, with the reason kept beside.

    A context manager, whose block is the request's life.
    """

    __slots__ = ("_leave", "_task", "cancelled_s", "deadline_s", "number", "public_id", "reason")

    def __init__(
        self,
        public_id: str,
        number: int,
        task: asyncio.Task[object],
        deadline_s: float,
        leave: Callable[[LiveRequest], None],
    ) -> None:
        """number: its own, for clients may choose the same id. deadline_s: on the loop's clock. `leave` is called at
        its end."""
        self.public_id = public_id
        self.number = number
        self.deadline_s = deadline_s
        self.reason: ServeError | None = None
        self.cancelled_s: float | None = None  # time.monotonic()
        self._task = task
        self._leave = leave

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(self)

    def cancel(self, reason: ServeError) -> None:
        """End the request with this error; only the first call counts."""
        if self.reason is None:
            self.reason = reason
            self.cancelled_s = time.monotonic()
            self._task.cancel()


class LiveRequests:
    """The table of live requests, the numbering of sequences, and the time limit.

    All requests have the same time, so the oldest one's deadline is the next: one timer serves them all.
    """

    def __init__(self, timeout_s: float = 600.0) -> None:
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._live: dict[int, LiveRequest] = {}  # by number: the oldest first
        self._next = 0
        self._entered = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._live)

    def new_sequence_id(self) -> RequestId:
        """From 1 on, never given twice."""
        self._next += 1
        return RequestId(self._next)

    def check_open(self) -> None:
        """Raises Overloaded while draining."""
        if self.draining:
            raise Overloaded("the server is shutting down", code="draining", retry_after_s=5.0)

    def enter(self, public_id: str) -> LiveRequest:
        """The present task answers a request, to be used in a `with`. Raises Overloaded while draining."""
        self.check_open()
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._entered += 1
        live = LiveRequest(public_id, self._entered, task, loop.time() + self._timeout_s, self._left)
        self._live[live.number] = live
        self._idle.clear()
        if self._timer is None:
            self._timer = loop.call_at(live.deadline_s, self._expire)
        return live

    def _left(self, live: LiveRequest) -> None:
        del self._live[live.number]
        if not self._live:
            self._idle.set()

    def cancel(self, public_id: str, reason: ServeError) -> bool:
        """All that are live under this id, for clients may choose the same. False when there is none."""
        found = [live for live in self._live.values() if live.public_id == public_id]
        for live in found:
            live.cancel(reason)
        return bool(found)

    def cancel_all(self, reason: ServeError) -> None:
        """Every live request ends with this error."""
        for live in list(self._live.values()):
            live.cancel(reason)

    def _expire(self) -> None:
        """Cancel the overdue requests and set the timer for the next one."""
        self._timer = None
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for live in list(self._live.values()):
            if live.reason is not None:
                continue
            if live.deadline_s > now_s:
                self._timer = loop.call_at(live.deadline_s, self._expire)
                return
            live.cancel(
                RequestTimedOut(
                    f"The answer took longer than {self._timeout_s:g} s; ask for fewer tokens, or start the server "
                    "with a longer --request-timeout."
                )
            )

    async def idle(self) -> None:
        """Return when no request is live."""
        await self._idle.wait()
