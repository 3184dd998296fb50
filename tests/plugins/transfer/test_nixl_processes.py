"""The nixl transfer in processes of its own: over both lanes, against dead, stopped and lying peers."""

import pickle
import subprocess
import sys
from pathlib import Path
from time import monotonic

import msgspec
import pytest

from trtserve.plugins.conformance.transfer_case import Copies, Layout, SiteRaised, TransferCase
from trtserve.plugins.conformance.transfer_deaths import (
    test_a_peer_that_dies_during_the_read,
    test_a_reader_that_dies_does_no_harm,
    test_the_import_of_a_stopped_peer_ends_in_time,
)
from trtserve.plugins.conformance.transfer_endings import test_drop_peer_during_a_read
from trtserve.plugins.conformance.transfer_reads import (
    test_all_blocks_of_several_regions_in_any_order,
)
from trtserve.plugins.transfer import nixl
from trtserve.plugins.transfer.nixl import library
from trtserve.plugins.transfer.nixl.payload import encode_payload
from trtserve.plugins.transfer_api import Cancelled, TransferOutcome

pytestmark = pytest.mark.skipif(nixl.missing("transfer", "nixl") is not None, reason="no NIXL")

__all__ = [
    "test_a_peer_that_dies_during_the_read",
    "test_a_reader_that_dies_does_no_harm",
    "test_all_blocks_of_several_regions_in_any_order",
    "test_drop_peer_during_a_read",
    "test_the_import_of_a_stopped_peer_ends_in_time",
]

QUICK_START = {"UCX_MEM_MMAP_HOOK_MODE": "none", "OPENBLAS_NUM_THREADS": "1"}  # see test_nixl_conformance.py
# What the plugin sets stays unset where the transfer ucx has set its own in this process, which others inherit.
QUICK_START["UCX_KEEPALIVE_INTERVAL"] = library.ENVIRONMENT["UCX_KEEPALIVE_INTERVAL"]
PLAN: Copies = {"keys": (range(5, 25), range(20))}
OTHER: Copies = {"keys": ([1, 2], [60, 61])}


@pytest.fixture
def transfer_under_test():
    """Over TCP, also for the suite's tests that are imported here."""
    return TransferCase(nixl.__name__, "nixl", environment={**QUICK_START, "UCX_TLS": "tcp"})


@pytest.fixture
def over_tcp(transfer_under_test):
    with transfer_under_test.deployment() as deployment:
        yield deployment


@pytest.fixture
def over_cma():
    with TransferCase(nixl.__name__, "nixl", environment=QUICK_START).deployment() as deployment:
        yield deployment


def test_late_bytes_of_a_stopped_peer_go_nowhere(over_tcp):
    reader, source = over_tcp.sites("reader", "source")
    peer = reader.import_site(source)
    assert peer.lane == "tcp"
    with source.stopped():
        ended = reader.read(peer, PLAN, deadline_s=0.3)
        assert (ended.outcome, ended.num_bytes) == (TransferOutcome.TIMED_OUT, 0)
        begun = reader.begin(peer, PLAN, then="cancel")
        assert begun["cancelled"] == Cancelled.STOPPED
        assert reader.ended(begun["id"]).outcome is TransferOutcome.CANCELLED
    # The answer to the first read comes before this one's.
    assert reader.read(peer, OTHER).outcome is TransferOutcome.DONE
    reader.check((peer, OTHER))


def test_a_stopped_peer_can_be_dropped_and_imported_again(over_tcp):
    reader, source = over_tcp.sites("reader", "source")
    peer = reader.import_site(source)
    with source.stopped():
        transfer_id = reader.begin(peer, PLAN)["id"]
        reader.call("drop", peer.number)
        assert reader.ended(transfer_id).outcome is TransferOutcome.PEER_LOST
    again = reader.import_site(source)
    assert reader.read(again, OTHER).outcome is TransferOutcome.DONE
    reader.check((again, OTHER))


def test_close_ends_though_a_peer_is_stopped(over_tcp):
    reader, source, other = over_tcp.sites("reader", "source", "other")
    peer = reader.import_site(source)
    with source.stopped():
        reader.begin(peer, PLAN, then="close")
        over_tcp.open(reader, "reader", incarnation=2)
        third = reader.import_site(other)
        assert reader.read(third, PLAN).outcome is TransferOutcome.DONE
        reader.check((third, PLAN))


def test_a_dead_peer_is_lost_and_others_are_not(over_cma):
    reader, source, other = over_cma.sites("reader", "source", "other")
    peer, third = reader.import_site(source), reader.import_site(other)
    assert peer.lane == third.lane == "cma"
    source.kill()
    for _ in range(2):
        assert reader.read(peer, PLAN).outcome is TransferOutcome.PEER_LOST
    assert reader.read(third, PLAN).outcome is TransferOutcome.DONE
    reader.check((third, PLAN))


def test_a_stopped_peer_is_read_over_cma(over_cma):
    reader, source = over_cma.sites("reader", "source")
    peer = reader.import_site(source)
    until_s = monotonic() + 1.2  # longer than UCX's keepalive interval was, each of which made a read wait for a poll
    with source.stopped():
        while monotonic() < until_s:
            assert reader.read(peer, PLAN).outcome is TransferOutcome.DONE
    reader.check((peer, PLAN))


def test_blocks_larger_than_a_piece(over_cma):
    layout = Layout("keys", 3, (33 << 20) + 17, (33 << 20) + 64)
    reader, source = over_cma.sites("reader", "source", layouts=[layout])
    peer = reader.import_site(source)
    plan = {"keys": ([2, 0], [0, 2])}
    assert reader.read(peer, plan).num_bytes == 2 * layout.block_bytes
    reader.check((peer, plan))


def test_pickles_and_damage_are_not_loaded(over_cma, tmp_path):
    reader, source = over_cma.sites("reader", "source")
    told = source.call("info")
    envelope = msgspec.msgpack.decode(told["export"])
    mark = tmp_path / "was loaded"
    damaged = bytearray(envelope[-1])
    damaged[len(damaged) // 2] ^= 1
    for payload in (encode_payload(pickle.dumps(Touch(mark))), pickle.dumps(Touch(mark)), bytes(damaged)):
        export = msgspec.msgpack.encode([*envelope[:-1], payload])
        with pytest.raises(SiteRaised, match="TransferError"):
            reader.import_export({**told, "export": export}, source.seed)
    assert not mark.exists()
    assert reader.read(reader.import_site(source), PLAN).outcome is TransferOutcome.DONE


def test_a_peer_is_imported_once_at_a_time(over_cma):
    reader, source = over_cma.sites("reader", "source")
    peer = reader.import_site(source)
    with pytest.raises(SiteRaised, match="imported already"):
        reader.import_site(source)
    with pytest.raises(SiteRaised, match="is this one"):
        reader.import_site(reader)
    assert reader.read(peer, PLAN).outcome is TransferOutcome.DONE


@pytest.mark.parametrize("script", ["nixl_interleaved.py", "nixl_guards.py"])
def test_in_a_process_of_its_own(script, monkeypatch):
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "3s")
    monkeypatch.setenv("UCX_MEM_MMAP_HOOK_MODE", "none")
    assert run(Path(__file__).with_name(script)) == ""


def test_another_ucx_in_the_process_is_refused():
    pytest.importorskip("libucx")
    program = """
import libucx
libucx.load_library()
from trtserve.plugins.transfer.nixl import make_transfer, missing
from trtserve.plugins.transfer_api import TransferConfig, TransferError
assert "has loaded UCX" in missing("transfer", "nixl")
try:
    make_transfer("nixl").open(TransferConfig("second", 1, "/nowhere"))
except TransferError as error:
    print("one of the transfers ucx and nixl" in str(error))
"""
    assert run("-c", program) == "True\n"


def test_gpu_memory_without_cuda_is_refused_with_advice(tmp_path):
    """As where NIXL's package is of another CUDA version than the machine's."""
    program = f"""
from trtserve.plugins.transfer.nixl import make_transfer
from trtserve.plugins.transfer_api import MemoryKind, Region, TransferConfig, TransferError
memory = bytearray(1 << 16)
address = id(memory) & ~0xFFF
transfer = make_transfer("nixl")
transfer.open(TransferConfig("w", 1, {str(tmp_path)!r}, device="cuda:0"))
try:
    transfer.register(Region("keys", address, 1, 4096, 4096, MemoryKind.CUDA))
except TransferError as error:
    print("beside CUDA 13 nixl-cu13" in str(error))
transfer.close()
"""
    assert run("-c", program) == "True\n"


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def run(*arguments):
    """What a Python process prints; it must end well."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
