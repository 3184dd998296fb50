"""Copies one piece between two mappings of this process.

ctypes' memmove runs without the interpreter's lock. It beat the alternatives where this was measured, for scattered
blocks of 64 KiB on two threads: process_vm_readv on the own process, a thousand blocks a call, took 1.2 to 1.5 times as
long, also beside a thread that computes in Python; preadv on the memfd takes over twice as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from trtserve.plugins.transfer.runs import Run


def copy_piece(runs: Iterable[Run]) -> None:
    """Copy every run; both of its addresses are mapped here."""
    memmove = ctypes.memmove
    for source, target, num_bytes in runs:
        memmove(target, source, num_bytes)
