"""A worker must never outlive its server, even one that was killed with SIGKILL and could not say so.

Two nets: the kernel kills the worker when its parent dies (PR_SET_PDEATHSIG), and a thread waits on the parent's
process descriptor, which also works where the parent's thread that started us has ended early.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

EXIT_ORPHANED = 9
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Arrange that this process ends when `parent_pid` does. Ends it at once if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died between starting us and the line above
        os._exit(EXIT_ORPHANED)
    descriptor = os.pidfd_open(parent_pid)
    threading.Thread(target=_exit_after, args=(descriptor,), name="parent-watch", daemon=True).start()


def _exit_after(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    # The whole group: an engine may have ranks of its own.
    os.killpg(0, signal.SIGKILL)
