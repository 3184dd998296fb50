"""The calls of libucp that the transfer makes, as Python functions: no policy and no state of its own.

Tiny calls hold the GIL: they take under a microsecond, and a thread that gives the GIL up may wait for a busy
neighbour's switch interval to get it back (measured beside one: reads of scattered blocks take 1.5 times as long if
every call releases it). Calls that copy, connect or pin memory release it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from ctypes.util import find_library
from functools import cache
from importlib.util import find_spec
from typing import Any

from trtserve.plugins.transfer.ucx.structs import ERR_LAST, Status

_HOLDING_THE_GIL: dict[str, tuple[Any, list[Any]]] = {
    "ucp_get_version": (None, [POINTER(c_uint)] * 3),
    "ucp_get_nbx": (c_void_p, [c_void_p, c_void_p, c_size_t, c_uint64, c_void_p, c_void_p]),
    "ucp_request_check_status": (Status, [c_void_p]),
    "ucp_request_free": (None, [c_void_p]),
    "ucp_worker_arm": (Status, [c_void_p]),
    "ucp_worker_signal": (Status, [c_void_p]),
    "ucp_worker_get_efd": (Status, [c_void_p, POINTER(c_int)]),
    "ucp_worker_get_address": (Status, [c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "ucp_worker_release_address": (None, [c_void_p, c_void_p]),
    "ucp_mem_query": (Status, [c_void_p, c_void_p]),
    "ucp_rkey_pack": (Status, [c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_size_t)]),
    "ucp_rkey_buffer_release": (None, [c_void_p]),
    "ucp_ep_query": (Status, [c_void_p, c_void_p]),
    "ucs_status_string": (c_char_p, [Status]),  # of libucs, which libucp brings
}
_RELEASING_THE_GIL: dict[str, tuple[Any, list[Any]]] = {
    "ucp_init_version": (Status, [c_uint, c_uint, c_void_p, c_void_p, POINTER(c_void_p)]),
    "ucp_cleanup": (None, [c_void_p]),
    "ucp_worker_create": (Status, [c_void_p, c_void_p, POINTER(c_void_p)]),
    "ucp_worker_destroy": (None, [c_void_p]),
    "ucp_worker_progress": (c_uint, [c_void_p]),
    "ucp_mem_map": (Status, [c_void_p, c_void_p, POINTER(c_void_p)]),
    "ucp_mem_unmap": (Status, [c_void_p, c_void_p]),
    "ucp_ep_create": (Status, [c_void_p, c_void_p, POINTER(c_void_p)]),
    "ucp_ep_rkey_unpack": (Status, [c_void_p, c_char_p, POINTER(c_void_p)]),
    "ucp_rkey_destroy": (None, [c_void_p]),
    "ucp_ep_close_nbx": (c_void_p, [c_void_p, c_void_p]),
}
FIRST_ERROR_POINTER = (1 << 64) + ERR_LAST
"""Where a returned `ucs_status_ptr_t` stops being a request and is an error."""


class UcxError(Exception):
    """A call failed; the text has the call and UCX's own words."""


class LibUcp:
    """The loaded library: each function an attribute under its own name, typed for ctypes."""

    def __init__(self, path: str) -> None:
        """Raises OSError where the library cannot be loaded, AttributeError where a function is not in it."""
        # Both are handles of one library, which the loader maps once.
        for library, signatures in (
            (ctypes.PyDLL(path), _HOLDING_THE_GIL),
            (ctypes.CDLL(path), _RELEASING_THE_GIL),
        ):
            for name, (result, arguments) in signatures.items():
                function = library[name]
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        self.path = path

    def __getattr__(self, name: str) -> Any:  # reached for unknown names only; tells mypy that the rest is Any
        raise AttributeError(name)

    def version(self) -> str:
        parts = (c_uint(), c_uint(), c_uint())
        self.ucp_get_version(*parts)
        return ".".join(str(part.value) for part in parts)

    def check(self, call: str, status: int) -> None:
        """Raises UcxError unless the status is UCS_OK."""
        if status:
            raise UcxError(f"{call}: {self.describe(status)}")

    def describe(self, status: int) -> str:
        """A status in UCX's words, with its number."""
        return f"{self.ucs_status_string(status).decode()} ({status})"


def is_installed() -> bool:
    """Whether there is a wheel or a system library; loads neither."""
    return find_spec("libucx") is not None or find_library("ucp") is not None


@cache
def load() -> LibUcp:
    """The wheel's library, or the system's. The environment must have been set before. Raises OSError."""
    if find_spec("libucx") is None:
        return LibUcp("libucp.so.0")
    import libucx

    # Loads what libucp needs, in the order that it must have, and keeps it loaded.
    handles = libucx.load_library()
    return LibUcp(handles[-1]._name if handles[-1] is not None else "libucp.so.0")


def request_status(pointer: int | None) -> int:
    """The status that a returned `ucs_status_ptr_t` stands for: UCS_OK, an error, or 1 for a request in progress."""
    if not pointer:
        return 0
    return pointer - (1 << 64) if pointer >= FIRST_ERROR_POINTER else 1
