"""KV transfer through shared memory, for host memory of workers on one node.

A worker's pool is a memfd. Peers get its descriptor over a Unix socket, map it read-only and copy from it; the owner
takes no part, so a read also succeeds while the owner is stopped, and after its death. Only the import needs it alive.
Nothing appears in /dev/shm. The memory goes with the last process that maps it: `drop_peer` those that died.
"""

from __future__ import annotations

import os
import sys

from pydantic import BaseModel

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.transfer.shm.options import ShmOptions
from trtserve.plugins.transfer_api import KVTransfer


@hookimpl
def make_transfer(name: str) -> KVTransfer | None:
    if name != "shm":
        return None
    from trtserve.plugins.transfer.shm.transfer import ShmTransfer

    return ShmTransfer()


@hookimpl
def missing(kind: str, name: str) -> str | None:
    if (kind, name) != ("transfer", "shm") or (sys.platform == "linux" and hasattr(os, "memfd_create")):
        return None
    return "transfer shm needs memfd_create, which only Linux has"


@hookimpl
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    return ShmOptions if (kind, name) == ("transfer", "shm") else None
