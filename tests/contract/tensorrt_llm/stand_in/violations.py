"""Broken rules of the documented interface: raised at the caller, and written down for tests that see no caller.

Not every error is a violation: a wrong configuration is the user's, a RequestError is the runtime's. A violation is
what a correct adapter never does, whatever its users ask for.
"""

from __future__ import annotations

import os
import threading

from .environment import variable

recorded: list[str] = []  # of this process, oldest first
_lock = threading.Lock()


class ContractViolation(RuntimeError):
    """The adapter did what the documentation forbids and the library would not have noticed in time."""


def record(text: str) -> None:
    """Write one violation down: in this process's list and in the file that TENSORRT_LLM_STAND_IN_VIOLATIONS names."""
    with _lock:
        recorded.append(text)
        path = variable("VIOLATIONS")
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"pid {os.getpid()}: {text}\n")


def violated(text: str) -> ContractViolation:
    """Record, and give the error to raise."""
    record(text)
    return ContractViolation(text)


def documented(error: Exception) -> Exception:
    """Record an error that the library is documented to raise for a caller's mistake, and give it back to raise."""
    record(f"{type(error).__name__}: {error}")
    return error
