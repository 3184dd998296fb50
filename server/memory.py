"""What a process keeps of memory that nobody uses, and what it costs to look for that."""

from __future__ import annotations

import ctypes
import gc

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3

_LARGE_BYTES = 128 * 1024
"""glibc's own values to begin with, for both. Setting them keeps them: else the first large table that is freed (a
vocabulary's) raises them to its size, and prompts and token tables leave holes that are never given back."""


_GC_THRESHOLDS = (10_000, 20, 50)
"""Requests make few cycles; the defaults look for them at every 700 new objects."""


def settle() -> None:
    """All that is there now lives as long as the process: no garbage collection need look at it."""
    gc.collect()
    return_free_memory()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def keep_free_memory_small() -> None:
    """Large pieces go back to the system as they are freed, where the C library is glibc. Call it before anything large
    is allocated."""
    _call("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTES)
    _call("mallopt", _M_TRIM_THRESHOLD, _LARGE_BYTES)


def return_free_memory() -> None:
    """Give back what is free now, in small pieces too, where the C library is glibc."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (OSError, AttributeError, TypeError):
        return  # not glibc
