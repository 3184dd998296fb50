"""No row is ever in two hands, every row comes back, and a lease says truly whether it held."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trtserve.plugins.transfer.lease import LeaseTable, RowPool

TTL_S = 30.0
NUM_ROWS = 24


class Hands(RuleBasedStateMachine):
    """Takes, gives, quarantines and leases, against plain sets and a dictionary of end times."""

    taken = Bundle("taken")
    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = RowPool(NUM_ROWS)
        self.table = LeaseTable(self.pool, TTL_S)
        self.now_s = 100.0
        self.free = set(range(NUM_ROWS))
        self.quarantined = set()
        self.ends = {}
        self.rows = {}

    def free_ended(self, lease_id):
        self.free |= set(self.rows.pop(lease_id))
        del self.ends[lease_id]

    @rule(target=taken, num_rows=st.integers(0, NUM_ROWS + 3))
    def take(self, num_rows):
        rows = self.pool.take(num_rows)
        assert len(rows) == min(num_rows, len(self.free))
        assert set(rows) <= self.free and len(set(rows)) == len(rows)
        self.free -= set(rows)
        return rows

    @rule(rows=consumes(taken), is_quarantined=st.booleans())
    def give_back(self, rows, is_quarantined):
        if is_quarantined:
            self.pool.quarantine(rows)
            assert self.pool.num_quarantined == len(rows)
        self.pool.give_back(rows)
        self.free |= set(rows)

    @rule(target=leases)
    def grant(self):
        lease_id = self.table.grant(self.now_s)
        assert lease_id > 0 and lease_id not in self.ends
        self.ends[lease_id], self.rows[lease_id] = self.now_s + TTL_S, []
        return lease_id

    @rule(rows=consumes(taken), lease_id=leases)
    def add(self, rows, lease_id):
        is_live = self.now_s < self.ends.get(lease_id, 0)
        assert self.table.add(lease_id, rows, self.now_s) is is_live
        if is_live:
            self.rows[lease_id] += rows
        else:
            self.pool.give_back(rows)
            self.free |= set(rows)

    @rule(lease_id=leases)
    def extend(self, lease_id):
        is_live = self.now_s < self.ends.get(lease_id, 0)
        assert self.table.extend(lease_id, self.now_s) is is_live
        if is_live:
            self.ends[lease_id] = self.now_s + TTL_S

    @rule(lease_id=leases | st.integers(0, 5))
    def release(self, lease_id):
        is_live = self.now_s < self.ends.get(lease_id, 0)
        assert self.table.release(lease_id, self.now_s) is is_live
        if is_live:
            self.free_ended(lease_id)

    @rule(later_s=st.sampled_from([0.0, 1.0, 10.0, TTL_S]))
    def time_passes(self, later_s):
        self.now_s += later_s

    @rule()
    def expire(self):
        over = [lease_id for lease_id, ends_s in self.ends.items() if ends_s <= self.now_s]
        assert self.table.expire(self.now_s) == len(over)
        for lease_id in over:
            self.free_ended(lease_id)

    @invariant()
    def counts_agree(self):
        assert self.pool.num_free == len(self.free)
        assert self.pool.num_quarantined == 0
        assert (len(self.table), self.table.num_rows) == (len(self.ends), sum(map(len, self.rows.values())))
        assert self.table.num_granted == len(self.table) + self.table.num_released + self.table.num_expired

    def teardown(self):
        """At the end of all leases only what callers hold is not free."""
        self.table.expire(self.now_s + TTL_S)
        free = self.free.union(*map(set, self.rows.values()))
        assert sorted(self.pool.take(NUM_ROWS)) == sorted(free)


TestHands = Hands.TestCase
TestHands.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.randoms())
def test_rows_given_back_in_any_order_are_one_run_again(sizes, random):
    pool = RowPool(48)
    rows = [row for size in sizes for row in pool.take(size)]
    random.shuffle(rows)
    for row in rows:
        pool.give_back([row])
    assert pool.take(48) == list(range(48))


def test_the_smallest_run_that_fits_is_taken():
    pool = RowPool(20)
    rows = pool.take(20)
    pool.give_back(rows[0:8])
    pool.give_back(rows[10:13])
    pool.give_back(rows[15:20])
    assert pool.take(3) == [10, 11, 12]
    assert pool.take(4) == [15, 16, 17, 18]
    assert pool.take(9) == [*range(8), 19]


@pytest.mark.parametrize("rows", [[0], [3, 3], [-1], [8]])
def test_rows_that_are_not_taken_cannot_be_given_back(rows):
    pool = RowPool(8)
    taken = pool.take(8)
    pool.give_back(taken[:3])
    with pytest.raises(ValueError, match="row"):
        pool.give_back(rows)
    with pytest.raises(ValueError, match="row"):
        pool.quarantine(rows)
    assert pool.num_free == 3


def test_quarantined_rows_are_counted_and_not_given_away():
    pool = RowPool(4)
    rows = pool.take(3)
    pool.quarantine(rows[:2])
    assert (pool.num_free, pool.num_quarantined) == (1, 2)
    assert pool.take(4) == [3]
    with pytest.raises(ValueError, match="row 0"):
        pool.quarantine([0])
    pool.give_back(rows)
    assert (pool.num_free, pool.num_quarantined) == (3, 0)


def test_a_lease_that_ended_counts_as_ended_before_it_is_swept():
    """Its rows are still where they were, but nobody may rely on that."""
    pool = RowPool(4)
    table = LeaseTable(pool, TTL_S)
    lease_id = table.grant(0.0)
    assert table.add(lease_id, pool.take(2), 0.0)
    assert not table.release(lease_id, TTL_S)
    assert pool.num_free == 2
    assert table.expire(TTL_S) == 1
    assert pool.num_free == 4


def test_one_sweep_ends_every_lease_that_is_over():
    """Whatever the order in which they were granted and extended."""
    pool = RowPool(4)
    table = LeaseTable(pool, TTL_S)
    first, second, third = (table.grant(float(number)) for number in range(3))
    table.extend(first, 20.0)
    assert table.expire(TTL_S + 2) == 2
    assert [table.extend(lease_id, 35.0) for lease_id in (first, second, third)] == [True, False, False]


def test_ids_of_two_tables_differ():
    assert LeaseTable(RowPool(1), TTL_S).grant(0.0) != LeaseTable(RowPool(1), TTL_S).grant(0.0)
