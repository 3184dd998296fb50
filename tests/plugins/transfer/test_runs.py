from array import array

from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.transfer.plan import check_plan
from trtserve.plugins.transfer.runs import Run, bytes_of, cut_pieces, merge_runs
from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, Region

NUM_BLOCKS = 12
block_ids = st.integers(0, NUM_BLOCKS - 1)
gaps = st.sampled_from([0, 0, 3])


@st.composite
def plans(draw):
    """A plan with the regions of both sides; ids often follow each other."""
    own, peer, copies = {}, {}, []
    for number in range(draw(st.integers(1, 2))):
        name, size = f"region {number}", draw(st.integers(1, 9))
        own[name] = Region(name, 10_000 * (number + 1), NUM_BLOCKS, size, size + draw(gaps))
        peer[name] = Region(name, 50_000 * (number + 1), NUM_BLOCKS, size, size + draw(gaps))
        length = draw(st.integers(0, NUM_BLOCKS))
        start, first = draw(block_ids), draw(st.integers(0, NUM_BLOCKS - length))
        targets = draw(st.permutations(range(NUM_BLOCKS)) | st.just(range(first, first + length)))[:length]
        sources = [(start + place) % NUM_BLOCKS for place in range(len(targets))]
        copies.append(BlockCopies(name, array("i", sources), array("i", targets)))
    return ReadPlan(copies), own, peer


def bytewise(runs):
    """Target address → source address, of every byte; fails where a byte is written twice."""
    copied = {}
    for run in runs:
        for offset in range(run.num_bytes):
            assert run.target + offset not in copied
            copied[run.target + offset] = run.source + offset
    return copied


def blockwise(plan, own, peer):
    return bytewise(
        Run(
            peer[copies.region].address + source * peer[copies.region].stride,
            own[copies.region].address + target * own[copies.region].stride,
            own[copies.region].block_bytes,
        )
        for copies in plan.copies
        for source, target in zip(copies.sources, copies.targets, strict=True)
    )


@given(plans(), st.integers(1, 40), st.integers(1, 5))
def test_every_byte_is_copied_once_and_pieces_keep_their_bounds(made, max_bytes, max_runs):
    plan, own, peer = made
    runs = merge_runs(plan, own, peer)
    assert bytes_of(runs) == check_plan(plan, own, peer)
    pieces = list(cut_pieces(runs, max_bytes, max_runs))
    assert all(0 < bytes_of(piece) <= max_bytes and len(piece) <= max_runs for piece in pieces)
    assert bytewise(run for piece in pieces for run in piece) == bytewise(runs) == blockwise(plan, own, peer)


def test_adjacent_blocks_become_one_run_unless_there_are_gaps():
    dense, gapped = Region("keys", 1000, 9, 10, 10), Region("keys", 2000, 9, 10, 12)
    plan = ReadPlan([BlockCopies("keys", array("i", [3, 4, 5, 7]), array("i", [0, 1, 2, 3]))])
    merged = merge_runs(plan, {"keys": dense}, {"keys": dense})
    assert merged == [Run(1030, 1000, 30), Run(1070, 1030, 10)]
    assert len(merge_runs(plan, {"keys": dense}, {"keys": gapped})) == 4
    assert len(merge_runs(plan, {"keys": gapped}, {"keys": dense})) == 4
