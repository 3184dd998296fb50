"""KV transfer by CUDA IPC, through CuPy: GPU memory of workers on one node, copied by the GPU that needs it.

A worker's pool is one plain `cudaMalloc` allocation, which peers open by its IPC handle and read with a kernel or the
copy engine; the owner takes no part. Rows are complete before a worker publishes them (an engine's `read_kv` returns
when its copies are done), and a read is over when its event says so: so no event has to cross processes.

An import keeps the memory of a dead worker from being freed: `drop_peer` those that died. Processes must see each
other's pids (containers: one pid namespace and one IPC namespace) and both GPUs; MIG slices cannot be opened.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.transfer_api import KVTransfer

_NAME = "cupy_ipc"
_DRIVER = Path("/proc/driver/nvidia/version")


@hookimpl
def make_transfer(name: str) -> KVTransfer | None:
    """The transfer, not yet opened."""
    if name != _NAME:
        return None
    from trtserve.plugins.transfer.cupy_ipc.transfer import CupyIpcTransfer

    return CupyIpcTransfer()


@hookimpl
def missing(kind: str, name: str) -> str | None:
    """What to install, or what stands in the way; None if it can be tried. Loads no library: the server asks too."""
    if (kind, name) != ("transfer", _NAME):
        return None
    if find_spec("cupy") is None:
        return "transfer cupy_ipc needs CuPy: pip install 'trtserve[cuda13]' (or cuda12, as the driver has it)"
    if not _DRIVER.exists() and not Path("/dev/nvidiactl").exists():
        return "transfer cupy_ipc needs an NVIDIA GPU, and this machine has no NVIDIA driver"
    return None
