"""CUDA IPC by CuPy: what only a device can show."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from trtserve.plugins.conformance.transfer_case import Layout, TransferCase
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.transfer.cupy_ipc.device import CupyDevice
from trtserve.plugins.transfer.cupy_ipc.gather import Gather

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.fixture
def case(device):
    problem = PluginManager().problem("transfer", "cupy_ipc")
    if problem is not None:
        pytest.skip(problem)
    return TransferCase("trtserve.plugins.transfer.cupy_ipc", "cupy_ipc", device=device)


@contextmanager
def free_bytes_kept(tolerance_bytes: int):
    """Within, what is taken of the device's memory is given back by the end."""
    import cupy

    cupy.cuda.Device(0).use()
    before, _ = cupy.cuda.runtime.memGetInfo()
    yield
    after, _ = cupy.cuda.runtime.memGetInfo()
    assert after >= before - tolerance_bytes, f"{(before - after) / MIB:.0f} MiB were not given back"


def test_the_memory_of_a_killed_worker_comes_back_when_it_is_dropped(case):
    pool = [Layout("pool", 512, MIB, MIB)]
    import cupy

    with free_bytes_kept(64 * MIB), case.deployment() as deployment:
        reader, source = deployment.sites("reader", "source", layouts=pool)
        peer = reader.import_site(source)
        before, _ = cupy.cuda.runtime.memGetInfo()
        source.kill()
        assert cupy.cuda.runtime.memGetInfo()[0] - before < 512 * MIB, "the import keeps it"
        reader.call("drop", peer.number)
        assert cupy.cuda.runtime.memGetInfo()[0] - before >= 512 * MIB


def test_copies_follow_what_was_queued_before_them(device):
    """The order of one stream: a gather behind a slow kernel reads what that kernel wrote."""
    import cupy

    gpu = CupyDevice(0)
    source, target = gpu.allocate(MIB), gpu.allocate(MIB)
    slow = cupy.RawKernel(
        r"""
        extern "C" __global__ void slow(int* numbers, long long cycles) {
            long long begun = clock64();
            while (clock64() - begun < cycles) {}
            numbers[threadIdx.x] = threadIdx.x + 7;
        }
        """,
        "slow",
    )
    from array import array

    with gpu._stream:
        slow((1,), (256,), (cupy.uint64(source), cupy.int64(200_000_000)))
    keep = gpu.gather(Gather(source, target, array("i", [0]), array("i", [0]), 1024, 1024, 1024))
    event = gpu.mark()
    assert not gpu.has_come(event), "the slow kernel takes a tenth of a second"
    while not gpu.has_come(event):
        pass
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(target, MIB, gpu, 0), 0)
    assert cupy.ndarray(256, cupy.int32, memory).tolist() == list(range(7, 263)) and keep is not None
    gpu.free(source)
    gpu.free(target)
