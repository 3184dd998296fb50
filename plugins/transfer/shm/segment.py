"""Sealed shared memory: a pool's own side, and a peer's read-only side of it.

A segment can neither shrink nor grow, and its pages exist before anyone maps it, so no access to it ever raises
SIGBUS: not when a peer misbehaves, not when memory runs out later.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtserve.plugins.transfer_api import TransferError

# linux/fcntl.h and asm-generic/mman-common.h; the fcntl module of Python 3.11 lacks the one, mmap lacks the other.
F_SEAL_FUTURE_WRITE = 0x10
MADV_POPULATE_READ = 22

POPULATE_STEP_BYTES = 16 << 20


class OwnSegment:
    """Memory of this process that peers can map read-only. The descriptor is open until `close`."""

    def __init__(self, num_bytes: int) -> None:
        """Raises OSError, also where there is not that much memory."""
        self.num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.num_bytes > (available := available_bytes()):  # else the kernel would kill processes to make room
            raise OSError(errno.ENOMEM, f"the machine has {available} bytes available")
        self.descriptor = os.memfd_create("trtserve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.descriptor, 0, self.num_bytes)
            self.mapping = mmap.mmap(self.descriptor, self.num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            _seal(self.descriptor)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.address = address_of(self.mapping)

    def view(self, offset: int, num_bytes: int) -> memoryview:
        return memoryview(self.mapping)[offset : offset + num_bytes]

    def close(self) -> None:
        """Give the descriptor back, and the memory too unless a view of it is still held."""
        os.close(self.descriptor)
        close_mapping(self.mapping)


class PeerSegment:
    """A peer's memory, mapped read-only; takes the descriptor and closes it."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Raises TransferError unless it is sealed memory of this size."""
        try:
            _check_sealed(descriptor, num_bytes)
            self.mapping = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise TransferError(f"cannot map the peer's memory: {error}") from error
        finally:
            os.close(descriptor)
        self.num_bytes = num_bytes
        self.address = address_of(self.mapping)

    def populate(self, until_s: float) -> None:
        """Enter the pages into this process's page table, as far as that is done by `until_s` on the monotonic clock.
        What is left costs the first read of it a fault every few pages."""
        for start in range(0, self.num_bytes, POPULATE_STEP_BYTES):
            if time.monotonic() >= until_s:
                return
            try:
                self.mapping.madvise(MADV_POPULATE_READ, start, min(POPULATE_STEP_BYTES, self.num_bytes - start))
            except OSError:  # Linux before 5.14
                return

    def view(self, offset: int, num_bytes: int) -> memoryview:
        return memoryview(self.mapping)[offset : offset + num_bytes]

    def close(self) -> None:
        close_mapping(self.mapping)


def available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it (MemAvailable, proc_meminfo(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError(errno.ENOSYS, "/proc/meminfo does not tell MemAvailable")


def close_mapping(mapping: mmap.mmap) -> None:
    """Unmap, or, while somebody holds a view, leave it to the last view's end: a view never dangles."""
    try:
        mapping.close()
    except BufferError:
        pass


def address_of(buffer: mmap.mmap | bytearray) -> int:
    """Where a buffer's bytes are; ctypes' own `from_buffer` refuses read-only ones."""
    with _exported(buffer) as view:
        return int(view.buf)


def _seal(descriptor: int) -> None:
    kept = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, kept | F_SEAL_FUTURE_WRITE)  # peers cannot map it writable
    except OSError:  # Linux before 5.1
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, kept)


def _check_sealed(descriptor: int, num_bytes: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
        raise TransferError(f"the peer handed out {status.st_size} bytes where it exports {num_bytes}")
    if status.st_blocks * 512 < num_bytes:
        raise TransferError("the peer's memory is not all there; it might be missing when it is read")
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & wanted != wanted:
        raise TransferError("the peer's memory is not sealed; it could vanish during a read")


class _PyBuffer(ctypes.Structure):
    """Py_buffer of CPython's stable ABI (docs.python.org/3/c-api/buffer.html)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


@contextmanager
def _exported(buffer: mmap.mmap | bytearray) -> Iterator[_PyBuffer]:
    view = _PyBuffer()
    simple = 0  # PyBUF_SIMPLE: contiguous bytes, may be read-only
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(view), simple)
    try:
        yield view
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
