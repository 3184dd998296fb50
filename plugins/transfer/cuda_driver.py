"""The few calls of CUDA's driver that transfers need where CuPy may be absent: who a device is, and plain memory.

Thin ctypes on libcuda, which the GPU's driver installs. Memory comes from `cuMemAlloc`, which is what `cudaMalloc`
gives: the kind that other processes can open and that UCX and NIXL register for CUDA IPC. Every call works in the
device's primary context, the one that torch and CuPy use, and makes it the calling thread's.
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from typing import Any
from uuid import UUID

from trtserve.plugins.transfer_api import Buffer, MemoryKind, TransferError

_CALLS: dict[str, list[Any]] = {
    "cuInit": [c_int],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetUuid": [c_char_p, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemcpyHtoD_v2": [c_uint64, c_void_p, c_size_t],
    "cuMemcpyDtoH_v2": [c_void_p, c_uint64, c_size_t],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
}
_UUID_BYTES = 16


def device_index(device: str) -> int:
    """N of ``cuda:N``; 0 of ``cuda``. Raises TransferError for what names no GPU."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        raise TransferError(f"CUDA memory lies on a device cuda:N, not on {device!r}")
    return int(index or "0")


def device_uuid(device: str) -> str:
    """The same in every process, whatever CUDA_VISIBLE_DEVICES says; "" for a device that is no GPU.

    Raises TransferError where there is no such GPU.
    """
    if not device.startswith("cuda"):
        return ""
    raw = ctypes.create_string_buffer(_UUID_BYTES)
    _call("cuDeviceGetUuid", raw, _ordinal(device))
    return str(UUID(bytes=raw.raw))


def allocate(num_bytes: int, device: str) -> Buffer:
    """Memory of its own allocation on a GPU, freed when the buffer's owner is forgotten. Raises TransferError."""
    use(device)
    address = c_uint64()
    _call("cuMemAlloc_v2", byref(address), num_bytes)
    return Buffer(address.value, num_bytes, MemoryKind.CUDA, _Owner(address.value, device))


def use(device: str) -> None:
    """Make the device's primary context this thread's. Raises TransferError."""
    _call("cuCtxSetCurrent", _primary_context(device))


def copy_in(address: int, source: int, num_bytes: int) -> None:
    """Copy from a host address to a device address; returns when it is there. `use` comes before."""
    _call("cuMemcpyHtoD_v2", address, source, num_bytes)


def write(address: int, content: bytes) -> None:
    """Copy host memory to a device address; returns when it is there. `use` comes before."""
    _call("cuMemcpyHtoD_v2", address, content, len(content))


def read(address: int, num_bytes: int) -> bytes:
    """Copy from a device address to host memory. `use` comes before."""
    content = ctypes.create_string_buffer(num_bytes)
    _call("cuMemcpyDtoH_v2", content, address, num_bytes)
    return content.raw


class _Owner:
    """Frees an allocation when nobody holds it any more."""

    def __init__(self, address: int, device: str) -> None:
        # At interpreter's end the driver frees everything, and may be gone itself.
        weakref.finalize(self, _free, address, device).atexit = False


def _free(address: int, device: str) -> None:
    use(device)
    _call("cuMemFree_v2", address)


@cache
def _primary_context(device: str) -> int:
    context = c_void_p()
    _call("cuDevicePrimaryCtxRetain", byref(context), _ordinal(device))
    assert context.value is not None
    return context.value


def _ordinal(device: str) -> int:
    ordinal = c_int()
    _call("cuDeviceGet", byref(ordinal), device_index(device))
    return ordinal.value


def _call(name: str, *arguments: Any) -> None:
    library = _library()
    status: int = getattr(library, name)(*arguments)
    if status:
        text = c_char_p()
        library.cuGetErrorName(status, byref(text))
        raise TransferError(f"CUDA refused {name}: {(text.value or b'').decode() or status}")


@cache
def _library() -> Any:
    """Raises TransferError where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"there is no CUDA driver here: {error}") from None
    for name, argument_types in _CALLS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, c_int
    status = library.cuInit(0)
    if status:
        raise TransferError(f"the CUDA driver does not start (cuInit gave {status}); is there a GPU?")
    return library
