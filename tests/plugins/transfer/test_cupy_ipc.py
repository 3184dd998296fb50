"""The cupy_ipc transfer on a GPU made of host memory: everything but CUDA itself."""

from __future__ import annotations

import ctypes
import os
from array import array
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plugins.transfer.fake_device import FakeDevice
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.transfer import cupy_ipc
from trtserve.plugins.transfer.cupy_ipc.gather import THREADS, Gather
from trtserve.plugins.transfer.cupy_ipc.payload import Allocation, Payload, decode_payload
from trtserve.plugins.transfer.cupy_ipc.transfer import CupyIpcTransfer
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer_api import (
    BlockCopies,
    Cancelled,
    MemoryKind,
    ReadPlan,
    Region,
    TransferConfig,
    TransferError,
    TransferOutcome,
)

BLOCKS, BLOCK_BYTES, STRIDE = 8, 96, 128


class Worker:
    """A transfer with one region of known bytes, in a process of its own as far as its peers can tell."""

    def __init__(self, name: str, pid: int, device: FakeDevice, runtime_dir: str, num_blocks: int = BLOCKS) -> None:
        self.device = device
        self.transfer = CupyIpcTransfer(lambda index: device)
        self.config = TransferConfig(name, 1, runtime_dir, device="cuda:0")
        self.transfer.open(self.config)
        self.info = replace(peer_info(self.config, device.uuid), pid=pid)
        buffer = self.transfer.allocate(num_blocks * STRIDE)
        self.region = Region("kv", buffer.address, num_blocks, BLOCK_BYTES, STRIDE, buffer.kind)
        for block in range(num_blocks):
            ctypes.memmove(self.region.address + block * STRIDE, f"{name}{block}".encode() * 48, BLOCK_BYTES)
        self.transfer.register(self.region)

    def block(self, number: int) -> bytes:
        return ctypes.string_at(self.region.address + number * STRIDE, BLOCK_BYTES)


@pytest.fixture
def workers(tmp_path):
    made = [
        Worker("d", os.getpid(), FakeDevice(), str(tmp_path)),
        Worker("p", 1, FakeDevice(uuid="gpu-b"), str(tmp_path)),
    ]
    yield made
    for worker in made:
        worker.device.events_come, worker.device.broken = True, ""
        worker.transfer.close()
        assert not worker.device.buffers and not worker.device.opened, "everything was given back"


@pytest.fixture
def reader(workers):
    return workers[0]


@pytest.fixture
def source(workers):
    return workers[1]


@pytest.fixture
def peer(reader, source):
    return reader.transfer.import_peer(source.info, source.transfer.export(), 1.0)


def plan(sources, targets):
    return ReadPlan([BlockCopies("kv", array("i", sources), array("i", targets))])


def test_scattered_blocks_come_in_one_launch(reader, source, peer):
    transfer_id = reader.transfer.read_blocks(peer, plan([5, 0, 7], [1, 3, 2]), 1.0)
    assert [(c.transfer_id, c.outcome, c.num_bytes) for c in reader.transfer.poll()] == [
        (transfer_id, TransferOutcome.DONE, 3 * BLOCK_BYTES)
    ]
    assert [reader.block(number) for number in range(4)] == [b"d0" * 48, *map(source.block, (5, 7, 0))]
    assert len(reader.device.launches) == 1 and peer.lane == "cuda_ipc_p2p" and peer.bandwidth_bytes_per_s > 0


def test_long_runs_go_to_the_copy_engine(tmp_path):
    size = 1 << 20
    device, other = FakeDevice(), FakeDevice()
    transfers = []
    for name, each in (("d", device), ("p", other)):
        transfer = CupyIpcTransfer(lambda index, each=each: each)
        transfer.open(TransferConfig(name, 1, str(tmp_path), device="cuda"))
        transfer.register(Region("kv", transfer.allocate(4 * size).address, 4, size, size, MemoryKind.CUDA))
        transfers.append(transfer)
    info = replace(peer_info(TransferConfig("p", 1, str(tmp_path), device="cuda"), other.uuid), pid=1)
    peer = transfers[0].import_peer(info, transfers[1].export(), 1.0)
    before = device.copied_runs
    transfers[0].read_blocks(peer, plan([0, 1, 3], [1, 2, 0]), 1.0)
    assert device.copied_runs - before == 2 and not device.launches and peer.lane == "cuda_ipc"
    for transfer in transfers:
        transfer.close()


def test_a_read_that_is_over_when_it_is_looked_at_late_is_done(reader, peer, monkeypatch):
    """This process may have had no processor for longer than the deadline."""
    now_s = [1.0]
    monkeypatch.setattr(reader.transfer._open.reads, "_clock", lambda: now_s[0])
    monkeypatch.setattr("trtserve.plugins.transfer.cupy_ipc.reads._SPIN_S", 0)
    reader.device.events_come = False
    late = reader.transfer.read_blocks(peer, plan([1], [1]), 2.0)
    reader.device.events_come = True
    now_s[0] = 9.0
    (completion,) = reader.transfer.poll()
    assert (completion.transfer_id, completion.outcome) == (late, TransferOutcome.DONE)


def test_a_deadline_that_had_passed_at_the_beginning(reader, peer):
    late = reader.transfer.read_blocks(peer, plan([1], [1]), -1.0)
    (completion,) = reader.transfer.poll()
    assert (completion.transfer_id, completion.outcome) == (late, TransferOutcome.TIMED_OUT)


def test_a_read_ends_only_when_the_gpu_has_ended_it(reader, peer):
    reader.device.events_come = False
    cancelled = reader.transfer.read_blocks(peer, plan([1], [1]), 10.0)
    late = reader.transfer.read_blocks(peer, plan([2], [2]), 0.0)
    assert reader.transfer.cancel(cancelled) is Cancelled.DRAINING
    assert reader.transfer.poll() == [] and reader.transfer.tick_s() > 0, "their targets may still be written to"
    reader.device.events_come = True
    outcomes = {completion.transfer_id: completion.outcome for completion in reader.transfer.poll()}
    assert outcomes == {cancelled: TransferOutcome.CANCELLED, late: TransferOutcome.TIMED_OUT}
    assert reader.transfer.cancel(late) is Cancelled.STOPPED and reader.transfer.tick_s() == 0


def test_the_memory_of_a_dropped_peer_is_closed_after_its_reads(reader, peer):
    reader.device.events_come = False
    reader.transfer.read_blocks(peer, plan([1], [1]), 10.0)
    reader.transfer.drop_peer(peer)
    assert reader.device.opened, "a copy reads from it"
    reader.device.events_come = True
    assert [completion.outcome for completion in reader.transfer.poll()] == [TransferOutcome.PEER_LOST]
    assert not reader.device.opened
    with pytest.raises(ValueError, match="not imported"):
        reader.transfer.read_blocks(peer, plan([1], [1]), 1.0)


def test_what_cuda_refuses_is_a_failed_read(reader, peer):
    reader.device.broken = "an illegal memory access"
    reader.transfer.read_blocks(peer, plan([1], [1]), 1.0)
    (completion,) = reader.transfer.poll()
    assert completion.outcome is TransferOutcome.FAILED and "illegal memory access" in completion.reason


def test_the_own_process_is_read_without_a_handle(reader, source):
    own = replace(source.info, pid=os.getpid())
    peer = reader.transfer.import_peer(own, source.transfer.export(), 1.0)
    assert not reader.device.opened
    reader.transfer.read_blocks(peer, plan([4], [0]), 1.0)
    reader.transfer.poll()
    assert reader.block(0) == source.block(4)


def test_who_cannot_be_reached(reader, source):
    reach = reader.transfer.unreachable
    assert reach(source.info) is None
    assert "another machine" in reach(replace(source.info, boot_id="other"))
    assert "pid namespace" in reach(replace(source.info, pid_namespace="pid:[1]"))
    assert "not visible" in reach(replace(source.info, device_uuid="gpu-z"))
    assert "not on a GPU" in reach(replace(source.info, device="cpu", device_uuid=""))


def test_an_import_that_fails_leaves_nothing_open(reader, source):
    exported = source.transfer.export()
    reader.device.events_come = False
    with pytest.raises(TransferError, match="did not end in time"):
        reader.transfer.import_peer(source.info, exported, 0.0)
    assert not reader.device.opened
    reader.device.events_come, reader.device.broken = True, "no"
    with pytest.raises(TransferError, match="cannot be opened: no"):
        reader.transfer.import_peer(source.info, exported, 1.0)


def test_only_own_memory_is_registered(reader):
    with pytest.raises(TransferError, match="not in memory that transfer cupy_ipc allocated"):
        reader.transfer.register(Region("other", 4096, 1, 64, 64, MemoryKind.CUDA))


@given(st.binary(max_size=200))
def test_a_payload_of_any_bytes_is_refused_or_understood(payload):
    info = peer_info(TransferConfig("p", 1, "/tmp"))
    try:
        decode_payload(payload, info, [])
    except TransferError:
        return
    assert msgspec.msgpack.decode(payload, type=Payload)


def test_a_region_outside_of_the_allocations_is_refused():
    info = peer_info(TransferConfig("p", 1, "/tmp"))
    payload = msgspec.msgpack.encode(Payload("gpu", [Allocation(4096, 4096, bytes(64))]))
    inside = Region("kv", 4096 + 1024, 3, 1024, 1024, MemoryKind.CUDA)
    assert decode_payload(payload, info, [inside]).device_uuid == "gpu"
    with pytest.raises(TransferError, match="outside of the memory"):
        decode_payload(payload, info, [replace(inside, num_blocks=4)])


@given(
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(1, 2**24),
    st.integers(0, 512),
    st.integers(1, 5000),
)
def test_words_and_grids_cover_every_block(source, target, block_bytes, gap, count):
    ids = array("i", range(count))
    work = Gather(source, target, ids, ids, block_bytes + gap, block_bytes, block_bytes)
    assert not any(number % work.word_bytes for number in (source, target, block_bytes, gap))
    blocks, parts = work.grid
    assert blocks == count and 1 <= parts <= 64
    assert parts * THREADS <= max(THREADS, block_bytes // work.word_bytes), "no thread block without work"


def test_it_is_there_and_says_what_is_missing(monkeypatch):
    manager = PluginManager()
    problem = manager.problem("transfer", "cupy_ipc")
    assert problem is None or "CuPy" in problem or "NVIDIA" in problem
    monkeypatch.setattr(cupy_ipc, "find_spec", lambda name: None)
    assert "pip install" in cupy_ipc.missing("transfer", "cupy_ipc")
