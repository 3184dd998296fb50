"""`IterationResult`: one shared queue for one executor and one reader, bound to the loop that made it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from tensorrt_llm.stand_in.violations import documented, violated


class IterationResult:
    """Ends when nothing comes for its timeout, and then stays ended until a new request is submitted: what arrives in
    between waits in the queue."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop | None, max_length: int | None) -> None:
        self._name = name
        self._loop = loop
        self._items: deque[dict[str, Any]] = deque(maxlen=max_length)
        self._arrived = asyncio.Event()
        self._timeout: float | None = None
        self._done = False
        self._reading = False

    def set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def mark_undone(self) -> None:
        self._done = False

    def put_all(self, items: list[dict[str, Any]]) -> None:
        """On the loop's thread."""
        self._items.extend(items)
        if items:
            self._arrived.set()

    def get_results(self) -> list[dict[str, Any]]:
        """What the synchronous readers give; in an event loop they would block it."""
        if self._loop is not None:
            raise violated(f"get_{self._name}() is called where only get_{self._name}_async() can be read")
        items = list(self._items)
        self._items.clear()
        return items

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._loop is None:
            raise documented(AssertionError("The asyncio event loop was not present during initialization"))
        if asyncio.get_running_loop() is not self._loop:
            raise violated(f"{self._name} are read from another event loop than the one of the first request")
        if self._reading:
            raise violated(f"{self._name} have two readers at once; the queue has one consumer")
        if self._done:
            raise StopAsyncIteration
        self._reading = True
        try:
            return await self._next()
        finally:
            self._reading = False

    async def _next(self) -> dict[str, Any]:
        while not self._items:
            self._arrived.clear()
            try:
                async with asyncio.timeout(self._timeout):
                    await self._arrived.wait()
            except TimeoutError:
                self._done = True
                raise StopAsyncIteration from None
        return self._items.popleft()


async def empty_iteration() -> AsyncIterator[dict[str, Any]]:
    """What stats are before the first request."""
    return
    yield
