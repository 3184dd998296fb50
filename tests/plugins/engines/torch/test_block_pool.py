"""The block pool: never leaks, never hands out a block in use."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.engines.torch.block_pool import BlockPool, OutOfBlocks

NUM_BLOCKS = 6
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "release", "validate", "share", "spoil"]), st.integers(0, 20)), max_size=60
)


@given(ACTIONS)
def test_every_block_is_in_one_state_whatever_happens(actions):
    evicted = []
    pool = BlockPool(NUM_BLOCKS, evicted.append)
    holdings: list[list[int]] = []
    valid: set[int] = set()
    for action, number in actions:
        if action == "allocate":
            wanted = number % (NUM_BLOCKS + 1)
            before = pool.num_free
            del evicted[:]
            try:
                taken = pool.allocate(wanted)
            except OutOfBlocks:
                assert wanted > before
                continue
            in_use = {block for holding in holdings for block in holding}
            assert not in_use & set(taken) and len(set(taken)) == wanted
            assert set(evicted) == valid & set(taken)
            valid -= set(taken)
            holdings.append(taken)
        elif holdings:
            chosen = holdings[number % len(holdings)]
            if action == "release":
                holdings.remove(chosen)
                pool.release(chosen)
            elif action == "validate":
                for block in chosen:
                    pool.mark_valid(block)
                valid |= set(chosen)
            elif action == "share":
                sharable = [block for block in chosen if block in valid]
                pool.acquire(sharable)
                holdings.append(sharable)
            else:
                for block in chosen:
                    pool.mark_worthless(block)
                valid -= set(chosen)
        held = Counter(block for holding in holdings for block in holding)
        assert all(pool.holders(block) == held[block] for block in range(NUM_BLOCKS))
        assert pool.num_free == NUM_BLOCKS - len(held)
    for holding in holdings:
        pool.release(holding)
    assert pool.num_free == NUM_BLOCKS
    assert sorted(pool.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS))


def test_the_end_of_the_least_recently_used_sequence_goes_first():
    evicted = []
    pool = BlockPool(4, evicted.append)
    old, new = pool.allocate(2), pool.allocate(2)
    for block in old + new:
        pool.mark_valid(block)
    pool.release(old)
    pool.release(new)
    pool.allocate(3)
    assert evicted == [old[1], old[0], new[1]]


def test_blank_blocks_go_before_cached_ones():
    evicted = []
    pool = BlockPool(3, evicted.append)
    kept = pool.allocate(1)
    pool.mark_valid(kept[0])
    pool.release(kept)
    pool.allocate(2)
    assert not evicted


def test_taking_too_many_takes_none():
    pool = BlockPool(3, lambda block_id: None)
    with pytest.raises(OutOfBlocks, match="4 KV blocks asked for, 3 of 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(0, lambda block_id: None)
