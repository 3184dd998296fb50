"""Memory that every step reads from end to end, on huge pages where Linux has them.

An allocator's memory is on huge pages only if it asked for them before it was first written, so here it's moved.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

_MADV_COLLAPSE = 25  # of Linux 6.1 and later; Python has no name for it
_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def onto_huge_pages(address: int, num_bytes: int) -> None:
    """Move all pages that hold these bytes, whatever else lies there; contents and addresses stay.

    A huge page at the end that reaches beyond what is mapped so far stays as it is, until something that comes to lie
    there is moved. Where the system can't, nothing happens: it's a matter of speed alone.
    """
    size = _page_size()
    if not size:
        return
    start = address // size * size
    stop = -(-(address + num_bytes) // size) * size
    try:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_COLLAPSE)
    except (OSError, AttributeError):
        return  # no such function here


@cache
def _page_size() -> int:
    """Bytes of a huge page; 0 where there are none."""
    try:
        return int(_PAGE_SIZE.read_text())
    except (OSError, ValueError):
        return 0
