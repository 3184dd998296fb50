"""From a worker's settings to its part in the KV hand-over."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from trtserve.plugins.manager import PluginManager
from trtserve.plugins.transfer import rdma
from trtserve.plugins.transfer_api import TransferConfig
from trtserve.server.workers import wire
from trtserve.server.workers.kv_exchange import ExchangeOptions
from trtserve.server.workers.kv_memory import TransferChoice
from trtserve.settings.schema import WorkerSettings


def auto_order() -> tuple[str, ...]:
    """What `auto` tries for each pair of workers, in this order, as far as it is installed: what is fastest within a
    node, then what reaches other nodes. NIXL's own UCX has the RDMA transports that libucp's wheel lacks.

    Only the first that can be opened of ucx and nixl is: nixl brings a UCX of its own, and two of them in one process
    are untested.
    """
    across_nodes = ("nixl", "ucx") if rdma.has_devices() and not rdma.ucx_uses_it() else ("ucx", "nixl")
    return ("shm", "cupy_ipc", *across_nodes)


def exchange_options(settings: WorkerSettings, hello: wire.Hello, manager: PluginManager) -> ExchangeOptions | None:
    """None for an aggregated worker, which neither gives nor takes KV. Raises PluginError where the transfer that the
    settings name cannot be used here, and OSError where there is no private folder for its sockets."""
    if settings.role == "agg":
        return None
    is_auto = settings.transfer == "auto"
    order = auto_order()
    names = [name for name in order if manager.problem("transfer", name) is None] if is_auto else [settings.transfer]
    choice = TransferChoice(
        make={name: partial(manager.make_transfer, name) for name in names},
        is_required=not is_auto,
        options={name: manager.check_options("transfer", name, {}) for name in names},
        instead={order[-1]: order[-2]},
    )
    config = TransferConfig(
        hello.worker_id, hello.incarnation, str(runtime_dir(settings.connect)), own_address(settings.connect)
    )
    tokens = settings.kv_transfer_tokens
    return ExchangeOptions(choice, config, None if tokens is None else -(-tokens // settings.block_size))


def runtime_dir(endpoint: str) -> Path:
    """A folder that only this user can enter, the same for all workers of a deployment on this machine: that of the
    server's socket, or one for all of this user's. Raises OSError."""
    parts = urlsplit(endpoint)
    if parts.scheme == "ipc" and parts.path.startswith("/") and not parts.netloc:
        return Path(parts.path).parent
    folder = Path(tempfile.gettempdir()) / f"trtserve-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} has to be a folder that only this user can enter; remove it or set TMPDIR")
    return folder


def own_address(endpoint: str) -> str:
    """The address by which this machine reaches the server, and so by which other workers reach this one."""
    parts = urlsplit(endpoint)
    if parts.scheme != "tcp" or parts.hostname is None:
        return "127.0.0.1"
    family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, parts.port or 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return str(probe.getsockname()[0])
