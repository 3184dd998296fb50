"""What the transfer asks of CUDA, as one small interface, and CuPy behind it.

All calls come from one thread. Copies are queued on a stream of the transfer's own, in order; an event marks a point in
it. A call raises DeviceError where CUDA refuses; after some errors it refuses everything until the process ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NewType, Protocol, TypeVar
from uuid import UUID

from trtserve.plugins.transfer.cupy_ipc.gather import SOURCE, THREADS, Gather
from trtserve.plugins.transfer.runs import Run

Event = NewType("Event", object)
_Result = TypeVar("_Result")

_COPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses say where they are
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is


class DeviceError(Exception):
    """CUDA refused a call."""


class Device(Protocol):
    """The worker's GPU, and what other ones there are."""

    @property
    def uuid(self) -> str: ...

    def allocate(self, num_bytes: int) -> int:
        """The address of an allocation of its own (`cudaMalloc`)."""

    def free(self, address: int) -> None: ...

    def handle(self, address: int) -> bytes:
        """For other processes, of an allocation's first address."""

    def open_handle(self, handle: bytes) -> int:
        """Another process's allocation, mapped here; close each exactly once. Never of this process's own."""

    def close_handle(self, address: int) -> None: ...

    def why_apart(self, uuid: str) -> str | None:
        """Why memory of that GPU cannot be read from this one; None if it can."""

    def copy(self, runs: Sequence[Run]) -> None:
        """Queue a copy for each run."""

    def gather(self, work: Gather) -> object:
        """Queue one launch; what it returns must live until an event after it has come."""

    def mark(self) -> Event:
        """An event after all that was queued so far."""

    def has_come(self, event: Event) -> bool: ...


class CupyDevice:
    """`Device` by CuPy. Raises DeviceError where it has no GPU."""

    def __init__(self, index: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(f"CuPy is not installed: {error}") from error
        if not cupy.cuda.is_available():
            raise DeviceError("CuPy finds no GPU")
        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._index = index
        self._kernels: dict[str, Any] = {}
        self._uuids = self._call(self._all_uuids)
        if index >= len(self._uuids):
            raise DeviceError(f"there is no device cuda:{index}, of {len(self._uuids)}")
        self._device: Any = cupy.cuda.Device(index)
        self._call(self._device.use)
        self._stream: Any = self._call(lambda: cupy.cuda.Stream(non_blocking=True))

    @property
    def uuid(self) -> str:
        return self._uuids[self._index]

    def allocate(self, num_bytes: int) -> int:
        return int(self._call(lambda: self._runtime.malloc(num_bytes)))

    def free(self, address: int) -> None:
        self._call(lambda: self._runtime.free(address))

    def handle(self, address: int) -> bytes:
        return bytes(self._call(lambda: self._runtime.ipcGetMemHandle(address)))

    def open_handle(self, handle: bytes) -> int:
        return int(self._call(lambda: self._runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS)))

    def close_handle(self, address: int) -> None:
        self._call(lambda: self._runtime.ipcCloseMemHandle(address))

    def why_apart(self, uuid: str) -> str | None:
        if uuid not in self._uuids:
            return f"GPU {uuid} is not visible to this process; let CUDA_VISIBLE_DEVICES name both"
        other = self._uuids.index(uuid)
        if other == self._index or self._call(lambda: self._runtime.deviceCanAccessPeer(self._index, other)):
            return None
        return f"GPU {self.uuid} cannot reach the memory of GPU {uuid}"

    def copy(self, runs: Sequence[Run]) -> None:
        self._call(lambda: self._copy(runs))

    def gather(self, work: Gather) -> object:
        return self._call(lambda: self._gather(work))

    def mark(self) -> Event:
        event = self._call(lambda: self._cupy.cuda.Event(block=False, disable_timing=True))
        self._call(lambda: event.record(self._stream))
        return Event(event)

    def has_come(self, event: Event) -> bool:
        cuda_event: Any = event
        return bool(self._call(lambda: cuda_event.done))

    def _copy(self, runs: Sequence[Run]) -> None:
        for source, target, num_bytes in runs:
            self._runtime.memcpyAsync(target, source, num_bytes, _COPY_DEFAULT, self._stream.ptr)

    def _gather(self, work: Gather) -> object:
        import numpy

        cupy = self._cupy
        if work.word not in self._kernels:
            self._kernels[work.word] = cupy.RawKernel(SOURCE, "gather", (f"-DWORD={work.word}",))
        with self._stream:
            # The transfer's arrays are C ints, which numpy takes over as they are; a list would go number by number.
            both = numpy.stack([numpy.frombuffer(ids, numpy.int32) for ids in (work.source_ids, work.target_ids)])
            ids = cupy.asarray(both)
            self._kernels[work.word](
                work.grid,
                (THREADS,),
                (
                    *(cupy.uint64(work.source), cupy.uint64(work.target), ids[0], ids[1]),
                    *(cupy.int64(work.source_stride), cupy.int64(work.target_stride)),
                    cupy.int64(work.block_bytes // work.word_bytes),
                ),
            )
        return ids

    def _all_uuids(self) -> list[str]:
        count = self._runtime.getDeviceCount()
        return [str(UUID(bytes=bytes(self._runtime.getDeviceProperties(index)["uuid"]))) for index in range(count)]

    def _call(self, function: Callable[[], _Result]) -> _Result:
        """CuPy tells of errors by classes of its own, one for each library behind it."""
        try:
            return function()
        except Exception as error:
            raise DeviceError(f"{type(error).__name__}: {error}") from error
