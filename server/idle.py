"""Closes connections that stay idle, without a task for each.

hypercorn 0.18 has a task wait beside every idle connection: one is made and cancelled for each request, and when a
client closes its connection the task, and with it the connection's buffers, stay until the keep-alive time is over.
`IdleTimers.new` makes what stands in for that task: a timer that closes the transport, which ends the connection by
the way of any other end of file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class IdleTimers:
    """The idle connections of one server."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: set[IdleTimer] = set()
        self._is_closing = False

    def new(self) -> IdleTimer:
        """For one connection."""
        return IdleTimer(self)

    def close_all(self) -> None:
        """Close every idle connection now, and each other one when it becomes idle."""
        self._is_closing = True
        for timer in list(self._idle):
            timer.close_connection()

    def add(self, timer: IdleTimer) -> float:
        """It is idle from now on; returns for how many seconds it may be."""
        self._idle.add(timer)
        return 0.0 if self._is_closing else self._timeout_s

    def discard(self, timer: IdleTimer) -> None:
        self._idle.discard(timer)


class IdleTimer:
    """Has the methods of hypercorn's AsyncioSingleTask, as its TCPServer calls them.

    A connection is idle and busy again thousands of times before its timer is of use, so the timer goes on while it is
    busy and looks, when it fires, since when the connection has been idle.
    """

    def __init__(self, timers: IdleTimers) -> None:
        self._timers = timers
        self._server: Any = None  # while the connection is idle; else only it would keep an ended one's buffers
        self._closes_at_s = 0.0
        self._handle: asyncio.TimerHandle | None = None

    async def restart(self, task_group: object, action: Callable[[], Awaitable[None]]) -> None:
        """The connection is idle from now on. `action` is the TCPServer's method that would wait."""
        self._server = action.__self__  # type: ignore[attr-defined]  # a bound method
        loop, allowed_s = self._server.loop, self._timers.add(self)
        self._closes_at_s = loop.time() + allowed_s
        if not allowed_s:
            loop.call_soon(self.close_connection)
        elif self._handle is None:
            self._handle = loop.call_at(self._closes_at_s, self._fire, loop)

    async def stop(self) -> None:
        """The connection is busy, or gone."""
        self._timers.discard(self)
        self._server = None

    def close_connection(self) -> None:
        """If it is idle still."""
        server = self._server
        if server is not None:
            self._timers.discard(self)
            self._server = None
            server.writer.close()

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = None
        if self._server is None:
            return
        if loop.time() < self._closes_at_s:
            self._handle = loop.call_at(self._closes_at_s, self._fire, loop)
        else:
            self.close_connection()
