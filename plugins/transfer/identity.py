"""Who this process is for its peers, and what that says of two processes before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path

from trtserve.plugins.transfer_api import PeerInfo, TransferConfig


def peer_info(config: TransferConfig, device_uuid: str = "") -> PeerInfo:
    """This process as its peers are to know it. device_uuid: of `config.device`, "" for the CPU."""
    return PeerInfo(
        worker_id=config.worker_id,
        incarnation=config.incarnation,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        uid=os.getuid(),
        pid=os.getpid(),
        host=config.host,
        device=config.device,
        device_uuid=device_uuid,
    )


def same_node(own: PeerInfo, peer: PeerInfo) -> bool:
    """Whether both run under one kernel; containers of one machine do."""
    return own.boot_id == peer.boot_id


def why_memory_is_apart(own: PeerInfo, peer: PeerInfo, *, by_pid: bool) -> str | None:
    """Why two processes cannot share or read each other's host memory; None if nothing speaks against it.

    by_pid: whether the peer is addressed by its process id, which means nothing in another pid namespace.
    """
    if not same_node(own, peer):
        return f"worker {peer.worker_id} runs on another machine ({peer.host})"
    if own.uid != peer.uid:
        return f"worker {peer.worker_id} runs as user {peer.uid}, this one as user {own.uid}"
    if by_pid and own.pid_namespace != peer.pid_namespace:
        return f"worker {peer.worker_id} runs in another pid namespace; let the containers share one"
    return None
