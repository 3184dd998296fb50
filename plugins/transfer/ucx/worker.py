"""One UCX context with its one worker: where memory is registered, endpoints are made and everything is moved on."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass

from trtserve.plugins.transfer.ucx import structs
from trtserve.plugins.transfer.ucx.libucp import LibUcp
from trtserve.plugins.transfer_api import MemoryKind

_MEMORY_TYPES = {MemoryKind.HOST: structs.MEMORY_TYPE_HOST, MemoryKind.CUDA: structs.MEMORY_TYPE_CUDA}


@dataclass(frozen=True, slots=True)
class MappedMemory:
    """Registered memory: what a get needs to know of its target, and what a peer needs to read it."""

    handle: int  # ucp_mem_h
    address: int
    num_bytes: int
    packed_rkey: bytes
    get_param: structs.RequestParam  # for gets into this memory


class UcxWorker:
    """Not thread safe. `close` last: endpoints, remote keys and requests of it must be gone by then.

    Methods that make or describe something raise UcxError where UCX refuses.
    """

    def __init__(self, library: LibUcp) -> None:
        self.library = library
        self._context = c_void_p()
        self._worker = c_void_p()
        self._mapped: list[MappedMemory] = []
        params = structs.Params(
            field_mask=structs.PARAMS_FEATURES, features=structs.FEATURE_RMA | structs.FEATURE_WAKEUP
        )
        status = library.ucp_init_version(
            structs.API_MAJOR, structs.API_MINOR, byref(params), None, byref(self._context)
        )
        library.check("ucp_init", status)
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        library = self.library
        params = structs.WorkerParams(field_mask=structs.WORKER_THREAD_MODE, thread_mode=structs.THREAD_MODE_SERIALIZED)
        library.check("ucp_worker_create", library.ucp_worker_create(self._context, byref(params), byref(self._worker)))
        descriptor = c_int(-1)
        library.check("ucp_worker_get_efd", library.ucp_worker_get_efd(self._worker, byref(descriptor)))
        self.event_fd = descriptor.value

    @property
    def handle(self) -> int:
        """`ucp_worker_h`."""
        assert self._worker.value is not None
        return self._worker.value

    def address(self) -> bytes:
        """How peers connect to this worker."""
        pointer, length = c_void_p(), c_size_t()
        status = self.library.ucp_worker_get_address(self._worker, byref(pointer), byref(length))
        self.library.check("ucp_worker_get_address", status)
        try:
            return ctypes.string_at(pointer.value or 0, length.value)
        finally:
            self.library.ucp_worker_release_address(self._worker, pointer)

    def map(self, address: int, num_bytes: int, kind: MemoryKind) -> MappedMemory:
        """Register memory that the caller keeps alive until `close`."""
        return self._map(address, num_bytes, kind)

    def allocate(self, num_bytes: int, kind: MemoryKind) -> MappedMemory:
        """Registered memory of UCX's own, until `close`."""
        return self._map(None, num_bytes, kind)

    def progress(self) -> int:
        """Move everything on a little; 0 where there was nothing to do."""
        moved: int = self.library.ucp_worker_progress(self._worker)
        return moved

    def arm(self) -> bool:
        """Make the event descriptor wait for what comes next; False where something came already."""
        armed: bool = self.library.ucp_worker_arm(self._worker) == structs.OK
        return armed

    def signal(self) -> None:
        """Make the event descriptor readable until the next `arm`."""
        self.library.ucp_worker_signal(self._worker)

    def close(self) -> None:
        """Give everything back; idempotent."""
        for memory in self._mapped:
            self.library.ucp_mem_unmap(self._context, memory.handle)
        self._mapped.clear()
        if self._worker:
            self.library.ucp_worker_destroy(self._worker)
            self._worker = c_void_p()
        if self._context:
            self.library.ucp_cleanup(self._context)
            self._context = c_void_p()

    def _map(self, address: int | None, num_bytes: int, kind: MemoryKind) -> MappedMemory:
        params = structs.MemMapParams(
            field_mask=structs.MEM_LENGTH | structs.MEM_FLAGS | structs.MEM_TYPE | structs.MEM_ADDRESS,
            address=address,
            length=num_bytes,
            flags=structs.MEM_FLAG_ALLOCATE if address is None else 0,
            memory_type=_MEMORY_TYPES[kind],
        )
        handle = c_void_p()
        status = self.library.ucp_mem_map(self._context, byref(params), byref(handle))
        self.library.check("ucp_mem_map", status)
        assert handle.value is not None
        try:
            memory = self._describe(handle.value, num_bytes, kind)
        except BaseException:
            self.library.ucp_mem_unmap(self._context, handle)
            raise
        self._mapped.append(memory)
        return memory

    def _describe(self, handle: int, num_bytes: int, kind: MemoryKind) -> MappedMemory:
        attributes = structs.MemAttr(field_mask=structs.MEM_ATTR_ADDRESS)
        self.library.check("ucp_mem_query", self.library.ucp_mem_query(handle, byref(attributes)))
        get_param = structs.RequestParam(
            op_attr_mask=structs.OP_MEMH | structs.OP_MEMORY_TYPE, memory_type=_MEMORY_TYPES[kind], memh=handle
        )
        return MappedMemory(handle, attributes.address, num_bytes, self._pack_rkey(handle), get_param)

    def _pack_rkey(self, handle: int) -> bytes:
        pointer, length = c_void_p(), c_size_t()
        status = self.library.ucp_rkey_pack(self._context, handle, byref(pointer), byref(length))
        self.library.check("ucp_rkey_pack", status)
        try:
            return ctypes.string_at(pointer.value or 0, length.value)
        finally:
            self.library.ucp_rkey_buffer_release(pointer)
