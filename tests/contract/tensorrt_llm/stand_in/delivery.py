"""From the engine's thread to the event loops that results are read on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tensorrt_llm.executor.result import Response

from .request import Request


def post_responses(posts: Iterable[tuple[Request, Response]]) -> None:
    """One wake-up for each event loop, whatever came."""
    batches: dict[asyncio.AbstractEventLoop | None, list[tuple[Request, Response]]] = {}
    for request, response in posts:
        batches.setdefault(request.result._loop, []).append((request, response))
    for loop, batch in batches.items():
        call_on(loop, partial(_put_all, batch))


def _put_all(batch: list[tuple[Request, Response]]) -> None:
    for request, response in batch:
        request.result._put(response)


def call_on(loop: asyncio.AbstractEventLoop | None, function: Callable[[], Any]) -> None:
    if loop is None:
        function()
        return
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        pass  # the loop is closed: nobody reads any more
