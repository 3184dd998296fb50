"""Event feeds: whatever happens to the messages, the index says what the worker has, or nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.server.router.feed import RESYNC_TIMEOUT_S, EventFeed, RoutedBlocks
from trtserve.server.router.index import PrefixIndex

CHAIN = list(range(100, 200))
NUM_BLOCKS = 8


class Worker:
    """A feed, the worker's true blocks, and the snapshots it was asked for."""

    def __init__(self):
        self.index = PrefixIndex()
        self.slot = self.index.add_worker(NUM_BLOCKS)
        self.asked = 0
        self.feed = EventFeed(self.index, self.slot, self.ask)
        self.blocks = set()
        self.next_event = 0

    def ask(self):
        self.asked += 1

    def step(self, *changes):
        """Change the true blocks; returns the step's message."""
        first = self.next_event
        for kind, blocks in changes:
            if kind == "stored":
                self.blocks.update(blocks)
            else:
                self.blocks.difference_update(blocks if kind == "removed" else set(self.blocks))
        self.next_event += len(changes)
        return first, changes

    def apply(self, message, now_s=0.0):
        self.feed.apply(*message, now_s)

    def take_snapshot(self):
        return self.next_event, list(self.blocks)

    @property
    def indexed(self):
        return set(self.index.stored(self.slot))


@pytest.fixture
def worker():
    return Worker()


def test_events_in_order_change_the_index(worker):
    worker.apply(worker.step(("stored", CHAIN[:4]), ("removed", CHAIN[3:4])))
    worker.apply(worker.step())
    worker.apply(worker.step(("stored", CHAIN[6:8])))
    assert worker.indexed == {*CHAIN[:3], *CHAIN[6:8]}
    worker.apply(worker.step(("cleared", ())))
    assert worker.indexed == set()
    assert worker.feed.is_known and not worker.asked


def test_a_lost_step_makes_the_worker_unknown_until_its_snapshot(worker):
    worker.apply(worker.step(("stored", CHAIN[:4])))
    reservation = worker.index.reserve(worker.slot, CHAIN[50:52])
    worker.step(("removed", CHAIN[:1]))
    worker.apply(worker.step(("stored", CHAIN[4:6])))
    assert not worker.feed.is_known
    assert worker.index.overlaps(CHAIN[50:]) == {worker.slot: 2}
    worker.apply(worker.step(("stored", CHAIN[6:7])))
    assert worker.indexed == set()
    assert (worker.asked, worker.feed.resyncs, worker.feed.gaps) == (1, 1, 1)
    worker.feed.snapshot(*worker.take_snapshot())
    assert worker.feed.is_known
    worker.apply(worker.step(("stored", CHAIN[8:9])))
    assert worker.indexed == worker.blocks == {*CHAIN[1:7], CHAIN[8]}
    worker.index.unreserve(reservation)
    assert worker.asked == 1


def test_a_gap_shows_in_a_step_without_events(worker):
    worker.step(("stored", CHAIN[:4]))
    worker.apply(worker.step())
    assert not worker.feed.is_known


def test_a_worker_that_does_not_answer_is_asked_again(worker):
    worker.step(("stored", CHAIN[:1]))
    for now_s in (10.0, 10.1, 10.0 + RESYNC_TIMEOUT_S - 0.1):
        worker.apply(worker.step(), now_s)
    assert worker.asked == 1
    for now_s in (10.0 + RESYNC_TIMEOUT_S, 10.1 + RESYNC_TIMEOUT_S):
        worker.apply(worker.step(), now_s)
    assert (worker.asked, worker.feed.gaps) == (2, 1)


def test_events_that_were_applied_are_skipped(worker):
    first = worker.step(("stored", CHAIN[:2]), ("removed", CHAIN[:1]))
    worker.apply(first)
    worker.step(("stored", CHAIN[2:3]))
    worker.apply((0, [*first[1], ("stored", CHAIN[2:3])]))
    worker.apply(first)
    worker.apply((1, first[1][1:]))
    worker.apply((0, ()))
    assert worker.indexed == worker.blocks == {*CHAIN[1:3]}
    assert worker.feed.is_known


def test_events_that_were_applied_do_not_overflow_a_full_worker(worker):
    first, changes = worker.step(("stored", CHAIN[:8]), ("removed", CHAIN[:4]), ("stored", CHAIN[8:12]))
    worker.apply((first, changes))
    worker.apply((first, [*changes, *worker.step(("removed", CHAIN[8:9]))[1]]))
    assert worker.feed.is_known
    assert worker.indexed == worker.blocks == {*CHAIN[4:8], *CHAIN[9:12]}


def test_a_snapshot_older_than_what_was_heard_is_ignored(worker):
    worker.apply(worker.step(("stored", CHAIN[:2])))
    old = worker.take_snapshot()
    worker.apply(worker.step(("removed", CHAIN[:1])))
    worker.feed.snapshot(*old)
    assert worker.indexed == {CHAIN[1]}
    worker.step(("stored", CHAIN[5:6]))
    worker.apply(worker.step(("stored", CHAIN[6:7])))
    worker.feed.snapshot(*old)
    assert not worker.feed.is_known
    worker.apply(worker.step(), RESYNC_TIMEOUT_S)
    assert worker.asked == 2
    worker.feed.snapshot(*worker.take_snapshot())
    assert worker.indexed == worker.blocks


def test_a_snapshot_that_a_step_overtook_is_ignored(worker):
    worker.step(("stored", CHAIN[:2]))
    worker.apply(worker.step(("stored", CHAIN[2:3])))
    overtaken = worker.take_snapshot()
    worker.apply(worker.step(("removed", CHAIN[:1])))
    worker.feed.snapshot(*overtaken)
    assert not worker.feed.is_known
    assert worker.indexed == set()
    worker.feed.snapshot(*worker.take_snapshot())
    assert worker.indexed == worker.blocks


def test_more_blocks_than_the_worker_has_make_it_unknown(worker):
    worker.apply(worker.step(("stored", CHAIN[:6]), ("stored", CHAIN[6:12]), ("removed", CHAIN[:6])))
    assert not worker.feed.is_known
    assert worker.indexed == set()
    assert (worker.asked, worker.feed.overflows, worker.feed.gaps) == (1, 1, 0)
    worker.feed.snapshot(*worker.take_snapshot())
    assert worker.indexed == {*CHAIN[6:12]}


def test_a_snapshot_with_more_blocks_than_the_worker_has_is_refused(worker):
    worker.apply(worker.step(("stored", CHAIN[:6])))
    worker.feed.snapshot(1, CHAIN[:12])
    assert not worker.feed.is_known
    assert worker.indexed == set()
    assert worker.asked == 0
    worker.apply(worker.step())
    assert worker.asked == 1
    worker.feed.snapshot(*worker.take_snapshot())
    assert worker.indexed == worker.blocks


BLOCKS = st.lists(st.sampled_from(CHAIN[:12]), min_size=1, max_size=4)
CHANGE = st.one_of(
    st.tuples(st.sampled_from(["stored", "removed"]), BLOCKS),
    st.just(("cleared", ())),
    st.tuples(st.just("stored"), BLOCKS),
)
FATE = st.sampled_from(["deliver", "deliver", "deliver", "lose", "twice", "late"])
STEPS = st.lists(st.tuples(st.lists(CHANGE, max_size=3), FATE), max_size=25)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 3), st.booleans())
def test_lost_doubled_and_reordered_messages(steps, answer_delay_steps, is_first_answer_lost):
    """The index never says what the worker did not have at that point, and is right once messages arrive again."""
    worker = Worker()
    true_sets = {0: set()}  # by the number of events that made them
    delayed, answers, now_s, answered = [], [], 0.0, int(is_first_answer_lost)

    def check():
        if worker.feed.is_known:
            assert worker.indexed == true_sets[worker.feed.next_event]
        else:
            assert worker.indexed == set()

    for changes, fate in steps:
        message = worker.step(*within_capacity(worker.blocks, changes))
        record(true_sets, message)
        now_s += 1.0
        for _ in range({"lose": 0, "late": 0, "twice": 2}.get(fate, 1)):
            worker.apply(message, now_s)
        if fate == "late":
            delayed.append(message)
        elif delayed:
            worker.apply(delayed.pop(0), now_s)
        check()
        if worker.asked > answered:
            answered = worker.asked
            answers.append((now_s + answer_delay_steps, worker.take_snapshot()))
        while answers and answers[0][0] <= now_s:
            worker.feed.snapshot(*answers.pop(0)[1])
            check()
    for message in (*delayed, worker.step()):
        worker.apply(message, now_s)
    now_s += RESYNC_TIMEOUT_S
    asked_before = worker.asked
    worker.apply(worker.step(), now_s)
    if not worker.feed.is_known:
        assert worker.asked == asked_before + 1
        worker.feed.snapshot(*worker.take_snapshot())
    assert worker.feed.is_known
    assert worker.indexed == worker.blocks


def within_capacity(blocks, changes):
    """Those changes that a worker with NUM_BLOCKS can make, one after the other."""
    blocks = set(blocks)
    for kind, hashes in changes:
        after = blocks.union(hashes) if kind == "stored" else blocks.difference(hashes or blocks)
        if len(after) <= NUM_BLOCKS:
            blocks = after
            yield kind, hashes


def record(true_sets, message):
    first, changes = message
    blocks = set(true_sets[first])
    for number, (kind, hashes) in enumerate(changes, first + 1):
        blocks = blocks.union(hashes) if kind == "stored" else blocks.difference(hashes or blocks)
        true_sets[number] = blocks


@pytest.fixture
def routed():
    index = PrefixIndex()
    return index, RoutedBlocks(index, index.add_worker(NUM_BLOCKS), NUM_BLOCKS)


def test_computed_prompts_count_as_stored(routed):
    index, blocks = routed
    reservation = index.reserve(0, CHAIN[:5])
    blocks.computed(CHAIN[:5])
    index.unreserve(reservation)
    assert index.overlaps(CHAIN) == {0: 5}


def test_the_end_of_the_prompt_used_least_recently_goes_first(routed):
    index, blocks = routed
    blocks.computed(CHAIN[:4])
    blocks.computed(CHAIN[10:14])
    blocks.computed(CHAIN[:2])
    blocks.computed(CHAIN[20:23])
    assert index.overlaps(CHAIN[:4]) == {0: 2}
    assert index.overlaps(CHAIN[10:14]) == {0: 3}
    assert index.overlaps(CHAIN[20:23]) == {0: 3}


def test_of_a_prompt_longer_than_the_cache_the_beginning_is_kept(routed):
    index, blocks = routed
    blocks.computed(CHAIN[50:53])
    blocks.computed(CHAIN[:20])
    assert set(index.stored(0)) == set(CHAIN[:NUM_BLOCKS])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=30))
def test_routed_blocks_are_an_lru_of_whole_beginnings(prompts):
    """Against a list, the block used last at its end."""
    index = PrefixIndex()
    blocks = RoutedBlocks(index, index.add_worker(NUM_BLOCKS), NUM_BLOCKS)
    recency = []
    for family, length in prompts:
        chain = [family * 1000 + depth for depth in range(length)]
        blocks.computed(chain)
        used = chain[:NUM_BLOCKS][::-1]
        recency = [block for block in recency if block not in used] + used
        recency = recency[-NUM_BLOCKS:]
        assert set(index.stored(0)) == set(recency)
        assert index.overlaps(chain).get(0, 0) == min(length, NUM_BLOCKS)
