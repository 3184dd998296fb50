"""`tensorrt_llm.executor.utils`: the one error that ends one request and leaves the executor alive."""

from __future__ import annotations

import asyncio


class RequestError(RuntimeError):
    """One request failed. Anything else from a result means that the executor is dead for good."""


def has_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
