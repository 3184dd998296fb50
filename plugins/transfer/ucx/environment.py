"""What UCX reads from the process environment, set once before the library is loaded.

A value that the user has set stays; `UCX_TLS`, `UCX_NET_DEVICES` and everything else pass through untouched.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DEFAULTS = {
    # Without it an endpoint that reports a lost peer has no CMA lane: reads within a node go over TCP, at a tenth.
    "UCX_RNDV_THRESH": "inf",
    "UCX_KEEPALIVE_INTERVAL": "1s",  # how soon a dead peer is seen where no socket tells
    "UCX_ERROR_SIGNALS": "",  # SIGSEGV and SIGBUS stay Python's
    "UCX_LOG_LEVEL": "error",
    "UCX_VFS_ENABLE": "n",  # a monitoring thread in every process
    # Reads of GPU memory are all that there is here; left to itself, UCX has no such lane where GPUs share no NVLink,
    # on a single one too, and sends their bytes by way of the CPU and TCP, a thousand times slower.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # Segments that one progress call copies over CMA; one at a time, calls cost more than small blocks.
    "UCX_CMA_TX_QUOTA": "32",
}

NIXL_IS_LOADED = "transfer ucx cannot be used in a process that has loaded NIXL, which brings another UCX"


def set_defaults() -> None:
    """Fill in what the user has not set. Later calls change nothing that UCX still reads."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def user_chose_transports() -> bool:
    """Whether a slow lane is the user's own choice."""
    return "UCX_TLS" in os.environ


def nixl_is_loaded() -> bool:
    """Whether NIXL, and with it a second UCX, is in this process."""
    if any(name.partition(".")[0].startswith("nixl") for name in sys.modules):
        return True
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    return any("/nixl" in line or "/libnixl" in line for line in maps.splitlines())
