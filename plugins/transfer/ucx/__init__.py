"""KV transfer over UCX: the kernel's cross-memory attach within a node, TCP or RDMA between nodes, CUDA IPC for GPUs.

A thin ctypes binding on libucp, from the wheel ``libucx-cu12`` (which has no RDMA transports) or the system. Reads are
one-sided gets into registered memory. What UCX itself reads of the environment is set before it loads; see
`environment`. Over TCP a reader that dies amid a read may end the process it reads from: see `endpoint`. Regions of
CUDA memory are handed over with their kind; that was written without a GPU at hand.
"""

from __future__ import annotations

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.transfer_api import KVTransfer

_NAME = "ucx"


@hookimpl
def make_transfer(name: str) -> KVTransfer | None:
    """The transfer, not yet opened."""
    if name != _NAME:
        return None
    from trtserve.plugins.transfer.ucx.transfer import UcxTransfer

    return UcxTransfer()


@hookimpl
def missing(kind: str, name: str) -> str | None:
    """What to install, or what stands in the way; None if it can be used. Loads no library."""
    if (kind, name) != ("transfer", _NAME):
        return None
    from trtserve.plugins.transfer.ucx import environment, libucp

    if not libucp.is_installed():
        return "transfer ucx needs libucp: pip install 'trtserve[ucx]', or a system package of UCX 1.13 or later"
    if environment.nixl_is_loaded():
        return environment.NIXL_IS_LOADED
    return None
