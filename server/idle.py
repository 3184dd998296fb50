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
        self._idle: dict[IdleTimer, asyncio.TimerHandle] = {}
        self._is_closing = False

    def new(self) -> IdleTimer:
        """For one connection."""
        return IdleTimer(self)

    def close_all(self) -> None:
        """Close every idle connection now, and each other one when it becomes idle."""
        self._is_closing = True
        for timer, handle in list(self._idle.items()):
            handle.cancel()
            self.fire(timer)

    def set(self, timer: IdleTimer) -> None:
        delay_s = 0 if self._is_closing else self._timeout_s
        self._idle[timer] = asyncio.get_running_loop().call_later(delay_s, self.fire, timer)

    def unset(self, timer: IdleTimer) -> None:
        handle = self._idle.pop(timer, None)
        if handle is not None:
            handle.cancel()

    def fire(self, timer: IdleTimer) -> None:
        self._idle.pop(timer, None)
        timer.close_connection()


class IdleTimer:
    """Has the methods of hypercorn's AsyncioSingleTask, as its TCPServer calls them."""

    def __init__(self, timers: IdleTimers) -> None:
        self._timers = timers
        self._server: Any = None

    async def restart(self, task_group: object, action: Callable[[], Awaitable[None]]) -> None:
        """The connection is idle from now on. `action` is the TCPServer's method that would wait."""
        self._server = action.__self__  # type: ignore[attr-defined]  # a bound method
        self._timers.unset(self)
        self._timers.set(self)

    async def stop(self) -> None:
        """The connection is busy, or gone."""
        self._timers.unset(self)

    def close_connection(self) -> None:
        self._server.writer.close()
