"""What is shm's own, beside the conformance suite."""

import fcntl
import mmap
import os
import resource
import select
import socket
import stat
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from pydantic import ValidationError

from trtserve.plugins.api import WorkerId
from trtserve.plugins.transfer import shm
from trtserve.plugins.transfer.export import encode_export
from trtserve.plugins.transfer.identity import peer_info
from trtserve.plugins.transfer.shm import transfer as shm_transfer
from trtserve.plugins.transfer.shm.handout import GREETING, MAX_SEGMENTS, DescriptorServer
from trtserve.plugins.transfer.shm.peer import Payload, SegmentPlace
from trtserve.plugins.transfer_api import (
    BlockCopies,
    Completion,
    MemoryKind,
    ReadPlan,
    Region,
    TransferConfig,
    TransferError,
    TransferOutcome,
)

NUM_BYTES = 1 << 20
DEADLINE_S = 10.0


@pytest.fixture
def runtime_dir():
    with tempfile.TemporaryDirectory(prefix="trt-") as folder:
        yield folder


@pytest.fixture
def opened(runtime_dir):
    """Makes open transfers; the info of a peer that imports one is `peer_info` of its configuration."""
    transfers = []

    def open_one(worker_id="one", **changes):
        config = replace(TransferConfig(WorkerId(worker_id), 1, runtime_dir), **changes)
        transfer = shm.make_transfer("shm")
        transfer.open(config)
        transfers.append(transfer)
        return transfer, peer_info(config)

    yield open_one
    for transfer in transfers:
        transfer.close()


def register(transfer, num_blocks=16, num_bytes=NUM_BYTES):
    """A region "keys" of the transfer's own memory; returns its buffer."""
    buffer = transfer.allocate(num_bytes)
    size = num_bytes // num_blocks
    transfer.register(Region("keys", buffer.address, num_blocks, size, size))
    return buffer


def read(transfer, peer, sources, targets, deadline_s=DEADLINE_S):
    copies = BlockCopies("keys", array("i", sources), array("i", targets))
    return transfer.read_blocks(peer, ReadPlan([copies]), deadline_s)


def completions(transfer, number) -> list[Completion]:
    """So many completions, waited for at the descriptor only."""
    found = []
    while len(found) < number:
        ready, _, _ = select.select([transfer.wakeup_fd()], [], [], DEADLINE_S)
        assert ready, f"{len(found)} of {number} completions came"
        found += transfer.poll()
    return found


def test_hooks_answer_for_shm_only():
    assert shm.make_transfer("ucx") is None
    assert shm.options_model("transfer", "ucx") is None
    assert shm.missing("transfer", "shm") is None
    assert shm.options_model("transfer", "shm")().copy_threads == 2
    with pytest.raises(ValidationError, match="copy_threads"):
        shm.options_model("transfer", "shm")(copy_threads=0)


def test_missing_says_why_where_there_is_no_memfd(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert "memfd_create" in shm.missing("transfer", "shm")
    assert shm.missing("transfer", "ucx") is None


def test_own_memory_is_writable_and_cannot_be_resized_or_written_by_others(opened):
    transfer, _ = opened()
    buffer = transfer.allocate(NUM_BYTES + 1)
    assert buffer.num_bytes == len(buffer.view) == NUM_BYTES + 1
    buffer.view[-1] = 7
    descriptor = buffer.owner.descriptor
    for num_bytes in (0, 8 * NUM_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, num_bytes)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, NUM_BYTES)


def test_memory_that_is_not_there_is_refused_at_once(opened):
    transfer, _ = opened()
    with pytest.raises(TransferError, match="cannot allocate"):
        transfer.allocate(1 << 62)


def test_regions_come_from_allocate(opened):
    transfer, _ = opened()
    buffer = transfer.allocate(NUM_BYTES)
    beyond = Region("keys", buffer.address, NUM_BYTES // 4096 + 1, 4096, 4096)
    with pytest.raises(TransferError, match="only memory from its own `allocate`"):
        transfer.register(beyond)
    with pytest.raises(TransferError, match="host memory, not cuda"):
        transfer.register(Region("keys", buffer.address, 1, 4096, 4096, MemoryKind.CUDA))


def test_reads_of_all_sizes_wake_the_descriptor_once_each(opened):
    reader, _ = opened("reader")
    source, info = opened("source")
    own, other = register(reader, num_bytes=8 << 20), register(source, num_bytes=8 << 20)
    other.view[:] = os.urandom(8 << 20)
    peer = reader.import_peer(info, source.export(), DEADLINE_S)
    ids = {
        read(reader, peer, [3], [5]),
        read(reader, peer, [1, 2, 9], [2, 3, 4]),
        read(reader, peer, range(8), range(8, 16)),
    }
    ended = completions(reader, 3)
    assert {end.transfer_id for end in ended} == ids
    assert all(end.outcome is TransferOutcome.DONE for end in ended)
    assert not select.select([reader.wakeup_fd()], [], [], 0)[0]
    assert own.view[4 << 20 :] == other.view[: 4 << 20]
    assert reader.tick_s() == 0


def test_views_outlive_their_peer(opened):
    reader, _ = opened("reader")
    source, info = opened("source")
    register(source).view[:] = bytes(range(256)) * (NUM_BYTES // 256)
    peer = reader.import_peer(info, source.export(), DEADLINE_S)
    (view,) = reader.map_blocks(peer, "keys", [2])
    reader.drop_peer(peer)
    reader.drop_peer(peer)
    source.close()
    assert bytes(view[:256]) == bytes(range(256))
    with pytest.raises(ValueError, match="dropped"):
        reader.map_blocks(peer, "keys", [2])
    with pytest.raises(ValueError, match="dropped"):
        read(reader, peer, [], [])


@pytest.mark.parametrize("block_ids", [[16], [-1], [0, 99]])
def test_only_blocks_that_exist_are_mapped(opened, block_ids):
    transfer, info = opened()
    register(transfer)
    peer = transfer.import_peer(info, transfer.export(), DEADLINE_S)
    with pytest.raises(ValueError, match="no region"):
        transfer.map_blocks(peer, "keys", block_ids)


def test_memory_allocated_after_an_export_does_not_disturb_it(opened):
    reader, _ = opened("reader")
    source, info = opened("source")
    register(source).view[:5] = b"first"
    exported = source.export()
    source.allocate(4096)
    peer = reader.import_peer(info, exported, DEADLINE_S)
    assert bytes(reader.map_blocks(peer, "keys", [0])[0][:5]) == b"first"


def test_a_peer_without_regions_can_be_imported(opened):
    transfer, info = opened()
    peer = transfer.import_peer(info, transfer.export(), DEADLINE_S)
    assert peer.bandwidth_bytes_per_s == 0


def test_more_reads_than_the_bound_fail_alone(opened, monkeypatch):
    transfer, info = opened()
    register(transfer, num_bytes=8 << 20)
    peer = transfer.import_peer(info, transfer.export(), DEADLINE_S)
    monkeypatch.setattr(shm_transfer, "MAX_READS", 0)
    transfer_id = read(transfer, peer, range(8), range(8, 16))
    (ended,) = completions(transfer, 1)
    assert (ended.transfer_id, ended.outcome, ended.num_bytes) == (transfer_id, TransferOutcome.FAILED, 0)
    assert "under way already" in ended.reason


def test_the_socket_is_private_and_goes_with_the_transfer(opened, runtime_dir):
    transfer, _ = opened()
    (path,) = Path(runtime_dir).iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(TransferError, match="cannot open the socket"):
        opened()  # the same worker and incarnation again
    transfer.close()
    assert not list(Path(runtime_dir).iterdir())
    assert transfer.poll() == []


def test_bad_options_are_refused(opened):
    with pytest.raises(TransferError, match="copy_threads"):
        opened(options={"copy_threads": "many"})


def test_a_folder_too_deep_for_a_socket_is_refused(opened, runtime_dir):
    with pytest.raises(TransferError, match="shorter folder"):
        opened(runtime_dir=runtime_dir + "/x" * 60)


def forged(runtime_dir, descriptors, places, regions=(), socket_name=None):
    """A server that hands out these descriptors, and an import that names them so."""
    config = TransferConfig(WorkerId("forger"), 1, runtime_dir)
    server = DescriptorServer(config)
    server.descriptors += descriptors
    server.start()
    payload = msgspec.msgpack.encode(Payload(socket_name or server.name, places))
    return server, peer_info(config), encode_export("shm", shm_transfer.VERSION, config, regions, payload)


def test_a_lack_of_descriptors_passes(runtime_dir):
    """What nobody could be handed while there was none free is handed out afterwards."""
    server = DescriptorServer(TransferConfig(WorkerId("poor"), 1, runtime_dir))
    server.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, peer = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with first, peer:
        peer.settimeout(0.2)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            for one in (first, peer):  # who waits in accept has a descriptor for the first one already
                one.connect(f"{runtime_dir}/{server.name}")
            with pytest.raises(TimeoutError):
                peer.recv(100)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        peer.settimeout(10)
        assert peer.recv(100) == GREETING
    server.close()


def memfd(num_bytes, seals=0, is_sparse=False):
    descriptor = os.memfd_create("forged", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.truncate(descriptor, num_bytes)
    if not is_sparse:
        os.posix_fallocate(descriptor, 0, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
PLACE = SegmentPlace(1 << 30, 4096)


@pytest.mark.parametrize(
    ("made", "forgery", "says"),
    [
        (lambda: memfd(4096), {}, "not sealed"),
        (lambda: memfd(4096, fcntl.F_SEAL_GROW), {}, "not sealed"),
        (lambda: memfd(4096, SEALS, is_sparse=True), {}, "not all there"),
        (lambda: memfd(8192, SEALS), {}, "handed out 8192"),
        (lambda: os.open("/dev/zero", os.O_RDWR), {}, "handed out"),
        (lambda: os.open(__file__, os.O_RDONLY), {}, "handed out|cannot map"),
        (lambda: memfd(4096, SEALS), {"places": [PLACE, PLACE]}, "1 of its 2 segments"),
        (lambda: memfd(4096, SEALS), {"regions": [Region("keys", 1 << 30, 2, 4096, 4096)]}, "lies outside"),
        (lambda: memfd(4096, SEALS), {"socket_name": "../other"}, "no name of a socket"),
        (lambda: memfd(4096, SEALS), {"socket_name": "absent"}, "gave no memory"),
    ],
)
def test_forged_memory_is_refused_and_nothing_is_kept(opened, runtime_dir, made, forgery, says):
    transfer, _ = opened()
    before = len(os.listdir("/proc/self/fd"))
    descriptor = made()
    server, info, exported = forged(runtime_dir, [descriptor], **{"places": [PLACE], **forgery})
    try:
        with pytest.raises(TransferError, match=says):
            transfer.import_peer(info, exported, DEADLINE_S)
    finally:
        server.close()
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_socket_of_another_process_is_refused(opened):
    transfer, info = opened()
    with pytest.raises(TransferError, match="has it been restarted"):
        transfer.import_peer(replace(info, pid=info.pid + 1), transfer.export(), DEADLINE_S)


def test_a_payload_that_makes_no_sense_is_refused(opened):
    transfer, info = opened()
    config = TransferConfig(info.worker_id, 1, "")
    for payload in (b"", b"\xff", msgspec.msgpack.encode(["name", [[1, 0]]])):
        with pytest.raises(TransferError, match="makes no sense"):
            transfer.import_peer(info, encode_export("shm", shm_transfer.VERSION, config, [], payload), DEADLINE_S)


def test_no_more_segments_than_can_be_handed_out(opened, runtime_dir):
    transfer, info = opened()
    for _ in range(MAX_SEGMENTS):
        transfer.allocate(4096)
    assert transfer.import_peer(info, transfer.export(), DEADLINE_S)
    with pytest.raises(TransferError, match="at most"):
        transfer.allocate(4096)


def test_sockets_that_killed_workers_left_are_swept_and_no_others(opened, runtime_dir):
    opened("alive")
    (living,) = Path(runtime_dir).glob("shm-*.sock")
    old, young = Path(runtime_dir) / "shm-old.sock", Path(runtime_dir) / "shm-young.sock"
    for path in (old, young):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
            left.bind(str(path))
    file = Path(runtime_dir) / "shm-file.sock"
    file.write_text("no socket")
    for path in (living, old, file):
        os.utime(path, (1, 1))
    opened("next")
    assert not old.exists()
    assert living.exists() and young.exists() and file.exists()
