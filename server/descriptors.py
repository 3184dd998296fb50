"""File descriptors: that the first three are there, and that there are enough of them."""

from __future__ import annotations

import os
import resource

_ENOUGH = 65_536


def open_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, put /dev/null there. Else the next file or socket would get that number, which libuv
    takes for a defect: it aborts the process when it is to close one of them. Call before anything is opened."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def allow_many_descriptors() -> int:
    """Raise this process's limit to what its user may have, 65,536 at most: each connection takes one, the usual limit
    is 1,024, and libuv closes connections beyond it without a word. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
