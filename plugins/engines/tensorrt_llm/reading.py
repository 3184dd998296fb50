"""The two side channels of an executor: KV cache events and iteration statistics. One reader each, on its loop.

Both are single-consumer queues that belong to the loop of the first request; before that request, reading events is an
assertion error there. After a silence they end, and are armed again by the next submission only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

logger = logging.getLogger(__name__)

SILENCE_S = 300.0
"""How long a reader waits for the next item before it needs a submission to go on. Long, since what happens while
nothing is submitted, such as blocks stored at the end of the last request, is wanted too."""

_PAUSE_S = 0.02


async def read_on(
    make: Callable[[float], AsyncIterator[Any]], submitted: asyncio.Event, take: Callable[[Mapping[str, Any]], None]
) -> None:
    """Read for as long as the task lives. make: begins an iteration, which ends after so many seconds of silence.
    submitted: this reader's own, set with each submission. An item that makes no sense is logged, once, and left out.
    """
    has_complained = False
    while True:
        submitted.clear()
        async for item in make(SILENCE_S):
            try:
                take(item)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                if not has_complained:
                    has_complained = True
                    logger.warning("TensorRT-LLM told something that is not understood: %r", error)
        # Whoever submitted while the iteration ended has set it; a pause keeps an executor that ends every iteration
        # at once from taking the loop.
        with suppress(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await submitted.wait()
        await asyncio.sleep(_PAUSE_S)
