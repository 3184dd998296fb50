"""KV transfer over NIXL: the kernel's cross-memory attach within a node, RDMA or TCP between nodes, CUDA IPC for GPUs.

NIXL brings its own UCX, with RDMA, and never shares a process with another one. There is no thread of ours or of
NIXL's: everything happens inside the calls of one thread. What follows from that:

- A target takes part in the first contact of each reader, and over TCP in every read, by calling `poll`. Over CMA and
  RDMA it then need not; a stopped worker can still be read from.
- `tick_s` is 20 ms for an idle worker, 0.7 % of a core; the first contact then takes about 100 ms. It is 1 ms for
  5 s after an `export`, and 0.2 ms while reads are under way here, or while a reader over TCP says (by a notification)
  that it reads from here.
- NIXL cannot stop a transfer: releasing it, or removing the peer's agent, leaves it to write when the peer answers
  after all. So slow connections, those that can hang, are read into memory of their own and copied from there, and a
  read of them ends at its deadline whatever the peer does. On fast ones a read that is late or cancelled ends when the
  hardware has ended it. Only `close` stops everything at once.
- Over TCP a worker that answers to a connection that is gone is aborted by UCX ("unexpected error: Endpoint timeout",
  UCX 1.23 of NIXL 1.5.1). That takes a reader that dies or closes amid a read while the worker does not poll; with a
  worker that polls in time it was not seen. So over TCP poll from a thread that never pauses.

CUDA regions go to NIXL as VRAM; that was written without a GPU at hand.
"""

from __future__ import annotations

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.transfer_api import KVTransfer

_NAME = "nixl"


@hookimpl
def make_transfer(name: str) -> KVTransfer | None:
    """The transfer, not yet opened."""
    if name != _NAME:
        return None
    from trtserve.plugins.transfer.nixl.transfer import NixlTransfer

    return NixlTransfer()


@hookimpl
def missing(kind: str, name: str) -> str | None:
    """What to install, or what stands in the way; None if it can be used. Loads no library."""
    if (kind, name) != ("transfer", _NAME):
        return None
    from trtserve.plugins.transfer.nixl import library

    return library.missing() or library.other_ucx()
