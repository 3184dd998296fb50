"""NIXL's agent with typed calls, and its errors as two kinds: the peer is lost, or the call failed.

Descriptor lists come as rows of [address, num_bytes, device, stride, count], uint64: count stretches of num_bytes, at
every stride. All calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

from trtserve.plugins.transfer_api import MemoryKind

Rows = NDArray[np.uint64]
Indices = NDArray[np.int32]
DescriptorList = NewType("DescriptorList", object)
Transfer = NewType("Transfer", object)

_BACKENDS = ["UCX"]  # of the plugins that NIXL has; others want libraries that are rarely there
_MEMORY = {MemoryKind.HOST: "DRAM", MemoryKind.CUDA: "VRAM"}
_OWN = "NIXL_INIT_AGENT"
_OWN_FAULTS = ("nixlInvalidParamError", "nixlMismatchError", "nixlNotSupportedError", "nixlNotAllowedError")


class AgentError(Exception):
    """NIXL refused a call, for a reason that lies here."""


class PeerLost(Exception):
    """The peer's process or connection is gone: every later call that concerns it fails too."""


class Agent:
    """One NIXL agent with the backend UCX, without threads. Registered memory must outlive `close`."""

    def __init__(self, api: Any, name: str) -> None:
        """api: NIXL's module `_api`. Takes about 0.1 s. Raises AgentError."""
        config = api.nixl_agent_config(
            enable_prog_thread=False,  # it would spin on a whole core
            backends=_BACKENDS,
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW,
        )
        self._nixl: Any = _call(api.nixl_agent, name, config)
        if "UCX" not in self._nixl.backends:
            raise AgentError("this build of NIXL has no plugin UCX")

    def register(self, address: int, num_bytes: int, kind: MemoryKind, device: int) -> None:
        """Make memory usable for transfers, until `close`. device: index, 0 for host memory."""
        _call(self._nixl.register_memory, [(address, num_bytes, device, "")], _MEMORY[kind], _BACKENDS)

    def metadata(self) -> bytes:
        """How to connect, and the keys of all memory registered so far."""
        metadata: bytes = _call(self._nixl.get_agent_metadata)
        return metadata

    def add_peer(self, metadata: bytes) -> str:
        """Load a peer's metadata, and begin to connect; returns the peer's agent name. Metadata of a peer that is
        loaded already must be what it was."""
        name = _call(self._nixl.add_remote_agent, metadata)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        """Forget a peer. What it still sends is written all the same, but nothing tells of it any more."""
        _call(self._nixl.remove_remote_agent, name)

    def own_list(self, rows: Rows, kind: MemoryKind) -> DescriptorList:
        return DescriptorList(_call(self._nixl.prep_xfer_dlist, _OWN, rows, _MEMORY[kind], _BACKENDS))

    def peer_list(self, name: str, rows: Rows, kind: MemoryKind) -> DescriptorList:
        return DescriptorList(_call(self._nixl.prep_xfer_dlist, name, rows, _MEMORY[kind], _BACKENDS))

    def begin_read(
        self, own: DescriptorList, own_ids: Indices, peer: DescriptorList, peer_ids: Indices
    ) -> tuple[Transfer, bool]:
        """Read from the peer's stretches into the own ones; returns the transfer and whether it is over already: over
        CMA the copy happens in this call, without the interpreter's lock."""
        # No notification is attached: with one, the read ends only when the peer has polled.
        transfer = _call(self._nixl.make_prepped_xfer, "READ", own, own_ids, peer, peer_ids, b"", _BACKENDS)
        return Transfer(transfer), self._is_over(self._nixl.transfer, transfer)

    def is_over(self, transfer: Transfer) -> bool:
        """Moves everything on, and says whether this transfer has ended well. Raises PeerLost or AgentError."""
        return self._is_over(self._nixl.check_xfer_state, transfer)

    def release(self, handle: DescriptorList | Transfer) -> None:
        """Give a list or a transfer back. A transfer that is not over goes on."""
        nixl_handle: Any = handle
        _call(nixl_handle.release)

    def notify(self, name: str) -> None:
        """Have the peer's next `progress` tell that something goes on."""
        _call(self._nixl.send_notif, name, b"read")

    def progress(self) -> bool:
        """Move everything on, above all what peers want of this side; whether one has notified."""
        return bool(_call(self._nixl.get_new_notifs, _BACKENDS))

    def close(self) -> None:
        """Stop all transfers and connections; waits for nobody. Nothing is written any more. Lists and transfers must
        have been released."""
        self._nixl = None

    def _is_over(self, call: Callable[[Any], Any], transfer: Any) -> bool:
        state = _call(call, transfer)
        if state not in ("DONE", "PROC"):
            raise PeerLost(f"NIXL reports {state}")
        return bool(state == "DONE")


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """NIXL tells of errors by a dozen classes right below Exception, and by whatever its bindings let through."""
    try:
        return function(*arguments)
    except Exception as error:
        kind = type(error).__name__
        text = str(error) if kind in str(error) or not kind.startswith("nixl") else f"{kind} ({error})"
        raise (AgentError if kind in _OWN_FAULTS or not kind.startswith("nixl") else PeerLost)(text) from error
