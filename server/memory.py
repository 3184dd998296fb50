"""What the C library keeps of memory that was given back to it, kept small. Does nothing where it is not glibc."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3

_LARGE_BYTES = 128 * 1024
"""glibc's own values to begin with, for both. Setting them keeps them: else the first large table that is freed (a
vocabulary's) raises them to its size, and prompts and token tables leave holes that are never given back."""


def keep_free_memory_small() -> None:
    """Large pieces go back to the system as they are freed. Call it before anything large is allocated."""
    _call("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTES)
    _call("mallopt", _M_TRIM_THRESHOLD, _LARGE_BYTES)


def return_free_memory() -> None:
    """Give back what is free now, in small pieces too."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    try:
        getattr(ctypes.CDLL(None), name)(*arguments)
    except (OSError, AttributeError, TypeError):
        return  # not glibc
