"""CUDA IPC by CuPy: what only a device can show."""

from __future__ import annotations

from array import array

import pytest

from tests.e2e.process import eventually
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


def free_bytes() -> int:
    """Of the device, whoever takes the rest."""
    import cupy

    cupy.cuda.Device(0).use()
    return int(cupy.cuda.runtime.memGetInfo()[0])


def test_the_memory_of_a_killed_worker_comes_back_when_it_is_dropped(case):
    pool = [Layout("pool", 1536, MIB, MIB)]  # more than a process has beside it
    with case.deployment() as deployment:
        reader, source = deployment.sites("reader", "source", layouts=pool)
        peer = reader.import_site(source)
        source.kill()
        kept = free_bytes()  # what else the dead process had comes back by itself
        reader.call("drop", peer.number)
        eventually(lambda: free_bytes() - kept >= 1536 * MIB, "the pool's memory is free")


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
    warm_up = Gather(source, target, array("i", [0]), array("i", [0]), 1024, 1024, 1024)
    gpu.gather(warm_up)  # compiles the kernel
    with gpu._stream:
        slow((1,), (256,), (cupy.uint64(source), cupy.int64(200_000_000)))
    keep = gpu.gather(warm_up)
    event = gpu.mark()
    assert not gpu.has_come(event), "the slow kernel takes a tenth of a second"
    while not gpu.has_come(event):
        pass
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(target, MIB, gpu, 0), 0)
    assert cupy.ndarray(256, cupy.int32, memory).tolist() == list(range(7, 263)) and keep is not None
    gpu.free(source)
    gpu.free(target)
