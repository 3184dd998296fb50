"""Finds and loads NIXL's Python package, with the process set up for it.

NIXL ships one package for each CUDA version, `nixl_cu12` and `nixl_cu13`; both work without CUDA. The package `nixl`
on top of them only chooses, by importing torch.
"""

from __future__ import annotations

import importlib
import logging
import logging.config
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    # Without it an endpoint that reports a lost peer has no CMA lane: reads within a node go over TCP, at a tenth.
    "UCX_RNDV_THRESH": "inf",
    # Reads of GPU memory are all that there is here; left to itself, UCX has no such lane where GPUs share no NVLink,
    # on a single one too, and sends their bytes by way of the CPU and TCP, a thousand times slower.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # A keepalive message goes by way of TCP, and the next read, over CMA too, ends only when the peer has polled for
    # it: later by a tick after every interval, never while the peer is stopped. The server tells of dead workers.
    "UCX_KEEPALIVE_INTERVAL": "inf",
    "UCX_ERROR_SIGNALS": "",  # SIGSEGV and SIGBUS stay Python's
    "UCX_LOG_LEVEL": "fatal",  # what happens to peers is told by completions
    "UCX_VFS_ENABLE": "n",  # a monitoring thread in every process
    "NIXL_LOG_LEVEL": "FATAL",
}
"""Read when the library is loaded. A value that the user has set stays."""

_PACKAGES = ("nixl_cu13", "nixl_cu12")


def missing() -> str | None:
    """What to install for NIXL, in one line; None if it is there."""
    if not any(find_spec(package) for package in _PACKAGES):
        return (
            "transfer nixl needs NIXL: pip install --no-deps nixl-cu12 "
            "(or nixl-cu13; without --no-deps they bring a CUDA build of torch)"
        )
    return None if find_spec("numpy") else "transfer nixl needs numpy: pip install numpy"


def other_ucx() -> str | None:
    """Why NIXL must not be loaded beside the UCX that is in this process already; None if there is none."""
    if any(package in sys.modules for package in _PACKAGES):
        return None  # what is loaded is its own
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        maps = ""
    paths = {line.split()[-1] for line in maps.splitlines() if "/libucp" in line}
    if not paths and "libucx" not in sys.modules:
        return None
    return (
        f"transfer nixl cannot be used in a process that has loaded UCX ({', '.join(sorted(paths)) or 'libucx'}): "
        "NIXL brings another one; use one of the transfers ucx and nixl in a process"
    )


def load(device: str) -> Any:
    """NIXL's module `_api`, of the CUDA version that torch was built for where a GPU is used. Raises ImportError."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    package = next((package for package in _preferred(device) if find_spec(package)), None)
    if package is None:
        raise ImportError(missing())
    with _logging_kept():
        return importlib.import_module(f"{package}._api")


def is_free_to_choose() -> bool:
    """Whether UCX chooses the transports; otherwise a slow one is the user's own choice."""
    return "UCX_TLS" not in os.environ


def _preferred(device: str) -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    version = str(getattr(getattr(torch, "version", None), "cuda", None) or "")
    if device.startswith("cuda") and version.startswith("12."):
        return _PACKAGES[::-1]
    return _PACKAGES


@contextmanager
def _logging_kept() -> Iterator[None]:
    """NIXL configures the logging of the whole process when it is imported: it closes every handler, adds one of its
    own and hides errors of handlers. Here its records go where all others go, from WARNING on."""
    configure, raise_exceptions = logging.config.dictConfig, logging.raiseExceptions
    logging.config.dictConfig = _ignore
    try:
        yield
    finally:
        logging.config.dictConfig, logging.raiseExceptions = configure, raise_exceptions
        logging.getLogger("nixl").setLevel(logging.WARNING)


def _ignore(config: Any) -> None:
    return None
