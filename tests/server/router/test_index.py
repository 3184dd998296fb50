"""The prefix index: stored and reserved blocks, and the depth to which a prompt is on each worker."""

import random

import pytest

from trtserve.server.router.index import PrefixIndex, TooManyBlocks

CHAIN = [2**63 + 7 * number for number in range(300)]


LOSE = (PrefixIndex.clear, lambda index, slot: index.replace(slot, []), lambda index, slot: index.remove(slot, CHAIN))
"""Ways for all stored blocks to go."""


@pytest.fixture
def index():
    return PrefixIndex()


def test_a_prompt_is_found_as_deep_as_each_worker_has_it(index):
    slots = [index.add_worker(100) for _ in range(4)]
    index.store(slots[0], CHAIN[:3])
    index.store(slots[1], CHAIN[:5])
    index.store(slots[2], CHAIN[1:5])
    assert index.overlaps(CHAIN[:5]) == {0: 3, 1: 5}
    assert index.overlaps(CHAIN[:2]) == {0: 2, 1: 2}
    assert index.overlaps(CHAIN[:1]) == {0: 1, 1: 1}
    assert index.overlaps([]) == index.overlaps([1, *CHAIN]) == {}


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 10, 16, 17, 18, 64, 255, 300])
def test_depths_of_many_workers_in_prompts_of_any_length(index, length):
    choose = random.Random(length)
    wanted = {}
    for _ in range(70):
        slot, depth = index.add_worker(300), choose.randint(0, length)
        index.store(slot, CHAIN[:depth])
        if depth:
            wanted[slot] = depth
    assert index.overlaps(CHAIN[:length]) == wanted


def test_a_hole_is_either_seen_or_jumped_over(index):
    slot = index.add_worker(300)
    index.store(slot, CHAIN[:200] + CHAIN[201:250])
    assert index.overlaps(CHAIN[:200]) == {slot: 200}
    assert index.overlaps(CHAIN) in ({slot: 200}, {slot: 250})


def test_removed_blocks_are_gone_and_unknown_ones_ignored(index):
    slot = index.add_worker(10)
    index.store(slot, CHAIN[:4])
    index.remove(slot, [CHAIN[3], CHAIN[3], 12345])
    assert index.overlaps(CHAIN) == {slot: 3}
    assert list(index.stored(slot)) == CHAIN[:3]
    assert (index.num_stored(slot), len(index)) == (3, 3)


def test_len_counts_a_block_once(index):
    for _ in range(3):
        index.store(index.add_worker(10), CHAIN[:4])
    index.reserve(0, CHAIN[:5])
    assert len(index) == 5


def test_replace_leaves_the_given_blocks_only(index):
    one, other = index.add_worker(5), index.add_worker(5)
    index.store(one, CHAIN[:5])
    index.store(other, CHAIN[:5])
    index.replace(one, [*CHAIN[:2], *CHAIN[10:13]])
    assert set(index.stored(one)) == {*CHAIN[:2], *CHAIN[10:13]}
    assert index.overlaps(CHAIN[:5]) == {one: 2, other: 5}


def test_a_worker_never_has_more_blocks_than_it_can(index):
    slot = index.add_worker(4)
    index.store(slot, CHAIN[:3])
    index.store(slot, [*CHAIN[:3], *CHAIN[:4]])
    with pytest.raises(TooManyBlocks, match="4 KV blocks"):
        index.store(slot, CHAIN[3:5])
    with pytest.raises(TooManyBlocks, match="reports 5 of them"):
        index.replace(slot, CHAIN[10:15])
    assert list(index.stored(slot)) == CHAIN[:4]
    assert index.overlaps(CHAIN) == {slot: 4}


def test_slots_are_reused_lowest_first(index):
    slots = [index.add_worker(10) for _ in range(4)]
    index.store(2, CHAIN[:3])
    index.remove_worker(1)
    index.remove_worker(2)
    assert slots == [0, 1, 2, 3]
    assert [index.add_worker(10) for _ in range(3)] == [1, 2, 4]
    assert index.num_stored(2) == len(index) == 0


def test_a_removed_workers_slot_cannot_be_used(index):
    slot = index.add_worker(10)
    index.remove_worker(slot)
    with pytest.raises(KeyError):
        index.store(slot, CHAIN[:1])


def test_a_reserved_block_counts_until_its_last_request_ends(index):
    slot = index.add_worker(10)
    first, second = index.reserve(slot, CHAIN[:3]), index.reserve(slot, CHAIN[:5])
    assert index.overlaps(CHAIN) == {slot: 5}
    index.unreserve(second)
    index.unreserve(second)
    assert index.overlaps(CHAIN) == {slot: 3}
    index.unreserve(first)
    assert index.overlaps(CHAIN) == {}
    assert index.num_reserved(slot) == len(index) == 0


def test_stored_blocks_survive_the_request_that_made_them(index):
    slot = index.add_worker(10)
    reservations = [index.reserve(slot, CHAIN[:4]) for _ in range(2)]
    index.store(slot, CHAIN[:3])
    assert index.num_reserved(slot) == 1
    for reservation in reservations:
        index.unreserve(reservation)
    assert index.overlaps(CHAIN) == {slot: 3}


def test_confirmed_and_removed_leaves_another_requests_reservation_alone(index):
    slot = index.add_worker(10)
    first = index.reserve(slot, CHAIN[:1])
    index.store(slot, CHAIN[:1])
    index.remove(slot, CHAIN[:1])
    second = index.reserve(slot, CHAIN[:1])
    index.unreserve(first)
    assert index.overlaps(CHAIN) == {slot: 1}
    index.unreserve(second)
    assert len(index) == 0


@pytest.mark.parametrize("lose", LOSE)
def test_a_block_that_was_stored_when_the_request_was_sent_is_not_its_reservation(index, lose):
    slot = index.add_worker(10)
    index.store(slot, CHAIN[:1])
    first = index.reserve(slot, CHAIN[:1])
    lose(index, slot)
    assert index.overlaps(CHAIN) == {}
    second = index.reserve(slot, CHAIN[:1])
    index.unreserve(first)
    assert index.overlaps(CHAIN) == {slot: 1}
    index.unreserve(second)
    assert len(index) == 0


@pytest.mark.parametrize("lose", LOSE)
def test_reservations_survive_the_loss_of_stored_blocks(index, lose):
    slot = index.add_worker(10)
    reservation = index.reserve(slot, CHAIN[:2])
    index.store(slot, CHAIN[10:14])
    lose(index, slot)
    assert index.overlaps(CHAIN) == {slot: 2}
    assert len(index) == 2
    index.unreserve(reservation)
    assert len(index) == 0


def test_a_reservation_ends_with_its_worker_not_with_the_next_one_in_its_slot(index):
    late = index.reserve(index.add_worker(10), CHAIN[:2])
    index.remove_worker(0)
    index.unreserve(late)
    later = index.reserve(index.add_worker(10), CHAIN[:2])
    index.remove_worker(0)
    slot = index.add_worker(10)
    current = index.reserve(slot, CHAIN[:2])
    index.unreserve(later)
    assert index.overlaps(CHAIN) == {slot: 2}
    index.unreserve(current)
    assert len(index) == 0
