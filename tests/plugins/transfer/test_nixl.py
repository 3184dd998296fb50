"""Parts of the nixl transfer that need no NIXL: pieces cover a plan, texts, payloads, devices, the end of reads."""

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.transfer import nixl
from trtserve.plugins.transfer.nixl import library
from trtserve.plugins.transfer.nixl.importer import device_index
from trtserve.plugins.transfer.nixl.layout import PIECE_STRETCHES, cut_plan, make_layout, stage_rows
from trtserve.plugins.transfer.nixl.payload import decode_payload, encode_payload
from trtserve.plugins.transfer.nixl.read import Read
from trtserve.plugins.transfer.runs import PIECE_BYTES
from trtserve.plugins.transfer_api import (
    BlockCopies,
    MemoryKind,
    PeerInfo,
    ReadPlan,
    Region,
    TransferError,
    TransferId,
    TransferOutcome,
)

PEER = PeerInfo("w1", 7, "boot", "pid:[1]", 0, 1, "127.0.0.1")
OWN_BASE, PEER_BASE = 1 << 40, 1 << 44
KINDS = st.sampled_from(MemoryKind)
BLOCK_BYTES = st.sampled_from([1, 1000, 65536, 5 << 20, PIECE_BYTES, PIECE_BYTES + 1, 40 << 20])


@st.composite
def reads(draw):
    """Own regions, the peer's, and a plan over them."""
    own, peer, copies = {}, {}, []
    for number in range(draw(st.integers(1, 4))):
        name, block_bytes, kind = f"r{number}", draw(BLOCK_BYTES), draw(KINDS)
        sides = []
        for regions, base in ((own, OWN_BASE), (peer, PEER_BASE)):
            num_blocks, gap = draw(st.integers(1, 20)), draw(st.sampled_from([0, 24]))
            address = base + (number << 36)
            regions[name] = Region(name, address, num_blocks, block_bytes, block_bytes + gap, kind)
            sides.append(num_blocks)
        targets = draw(st.lists(st.integers(0, sides[0] - 1), unique=True))
        sources = draw(st.lists(st.integers(0, sides[1] - 1), min_size=len(targets), max_size=len(targets)))
        copies.append(BlockCopies(name, array("i", sources), array("i", targets)))
    return own, peer, ReadPlan(copies)


def stretches(rows):
    """(address, bytes) of every descriptor that rows stand for, by index."""
    return [
        (int(address) + index * int(stride), int(num_bytes))
        for address, num_bytes, _, stride, count in rows
        for index in range(int(count))
    ]


@settings(deadline=None)
@given(reads())
def test_pieces_copy_exactly_what_the_plan_says(read):
    own, peer, plan = read
    layouts = {
        kind: tuple(make_layout([region for region in side.values() if region.kind is kind], 0) for side in (own, peer))
        for kind in {region.kind for region in own.values()}
    }
    copied = []
    for piece in cut_plan(plan, own, peer, layouts):
        own_stretches, peer_stretches = (stretches(layout.rows) for layout in layouts[piece.kind])
        assert 0 < piece.num_bytes <= PIECE_BYTES
        assert len(piece.sizes) <= PIECE_STRETCHES
        for own_id, peer_id, address, size in zip(
            piece.own_ids, piece.peer_ids, piece.addresses, piece.sizes, strict=True
        ):
            assert own_stretches[own_id] == (address, size)
            assert peer_stretches[peer_id][1] == size
            copied.append((peer_stretches[peer_id][0], int(address), int(size)))
    assert sorted(copied) == sorted(wanted(own, peer, plan))


def wanted(own, peer, plan):
    """(source, target, bytes) of every part of every block, straight from the contract."""
    for copies in plan.copies:
        mine, theirs = own[copies.region], peer[copies.region]
        for source, target in zip(copies.sources, copies.targets, strict=True):
            for offset in range(0, mine.block_bytes, PIECE_BYTES):
                yield (
                    theirs.address + source * theirs.stride + offset,
                    mine.address + target * mine.stride + offset,
                    min(PIECE_BYTES, mine.block_bytes - offset),
                )


def test_staged_stretches_follow_each_other():
    assert stretches(stage_rows(100, np.array([5, 1, 7]))) == [(100, 5), (105, 1), (106, 7)]


def test_many_small_blocks_make_several_pieces():
    region = Region("r", OWN_BASE, 2 * PIECE_STRETCHES + 1, 16, 16)
    layout = make_layout([region], 0)
    ids = array("i", range(region.num_blocks))
    plan, regions = ReadPlan([BlockCopies("r", ids, ids)]), {"r": region}
    pieces = list(cut_plan(plan, regions, regions, {MemoryKind.HOST: (layout, layout)}))
    assert [len(piece.sizes) for piece in pieces] == [PIECE_STRETCHES, PIECE_STRETCHES, 1]


def test_a_payload_comes_back():
    assert decode_payload(encode_payload(b"metadata"), PEER) == b"metadata"


@given(st.binary(max_size=64))
def test_other_bytes_are_no_payload(payload):
    with pytest.raises(TransferError, match="worker w1"):
        decode_payload(payload, PEER)


@given(st.integers(0), st.integers(0, 7))
def test_a_changed_payload_is_refused(position, bit):
    payload = bytearray(encode_payload(b"some metadata of an agent"))
    payload[position % len(payload)] ^= 1 << bit
    with pytest.raises(TransferError):
        decode_payload(bytes(payload), PEER)


@pytest.mark.parametrize(("device", "index"), [("cuda:3", 3), ("cuda", 0), ("cuda:0", 0)])
def test_device_index(device, index):
    assert device_index(device) == index


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "cuda:-1", ""])
def test_no_device_for_cuda_memory(device):
    with pytest.raises(TransferError, match="cuda:N"):
        device_index(device)


def test_missing_says_how_to_install(monkeypatch):
    monkeypatch.setattr(library, "_PACKAGES", ("nixl_that_is_nowhere",))
    problem = nixl.missing("transfer", "nixl")
    assert "pip install --no-deps nixl-cu12" in problem
    assert "\n" not in problem
    assert nixl.missing("transfer", "other") is None
    assert nixl.make_transfer("other") is None


def test_a_stopped_read_waits_for_what_is_under_way():
    layout = make_layout([Region("r", OWN_BASE, 4, PIECE_BYTES, PIECE_BYTES)], 0)
    regions = {"r": Region("r", OWN_BASE, 4, PIECE_BYTES, PIECE_BYTES)}
    ids = array("i", range(4))
    plan = ReadPlan([BlockCopies("r", ids, ids)])
    read = Read(TransferId(1), cut_plan(plan, regions, regions, {MemoryKind.HOST: (layout, layout)}), 10.0, 20.0)
    read.take_piece()
    read.stop(TransferOutcome.CANCELLED, "cancelled")
    read.stop(TransferOutcome.PEER_LOST, "lost")
    assert not read.has_more
    assert not read.has_ended
    read.end_piece(PIECE_BYTES)
    assert read.has_ended
    completion = read.completion(11.5)
    assert (completion.outcome, completion.num_bytes) == (TransferOutcome.CANCELLED, PIECE_BYTES)
    assert (completion.duration_s, completion.reason) == (1.5, "cancelled")
