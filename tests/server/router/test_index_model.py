"""The prefix index against plain sets: any order of its operations, on several workers at once."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule

from trtserve.server.router.index import Overlaps, PrefixIndex, TooManyBlocks

NUM_BLOCKS = 10
BLOCKS = st.integers(0, 15).map(lambda number: number * 0x9E3779B97F4A7C15 % 2**64)
SETS = st.lists(BLOCKS, max_size=12)
CHAINS = st.permutations([number * 0x9E3779B97F4A7C15 % 2**64 for number in range(16)]).flatmap(
    lambda order: st.integers(0, 16).map(lambda length: tuple(order[:length]))
)


class Worker:
    """What the model knows of a worker: its blocks, and for each reservation what is left of it."""

    def __init__(self):
        self.stored = set()
        self.reserved = {}  # serial -> Counter of blocks

    @property
    def visible(self):
        return self.stored.union(*self.reserved.values())

    def confirm(self, blocks):
        for left in self.reserved.values():
            for block in blocks:
                del left[block]


class IndexMachine(RuleBasedStateMachine):
    reservations = Bundle("reservations")
    followed = Bundle("followed")

    @initialize()
    def start(self):
        self.index = PrefixIndex()
        self.workers = {}
        self.open = []
        self.serial = 0

    def slot(self, data):
        return data.draw(st.sampled_from(sorted(self.workers))) if self.workers else None

    @rule()
    def add_worker(self):
        if len(self.workers) == 4:
            return
        slot = self.index.add_worker(NUM_BLOCKS)
        assert slot == min(set(range(5)) - set(self.workers))
        self.workers[slot] = Worker()

    @rule(data=st.data())
    def remove_worker(self, data):
        slot = self.slot(data)
        if slot is not None:
            self.index.remove_worker(slot)
            del self.workers[slot]

    @rule(data=st.data(), blocks=SETS)
    def store(self, data, blocks):
        slot = self.slot(data)
        if slot is None:
            return
        worker = self.workers[slot]
        try:
            self.index.store(slot, blocks)
        except TooManyBlocks:
            assert len(worker.stored.union(blocks)) > NUM_BLOCKS
        else:
            worker.stored.update(blocks)
            worker.confirm(blocks)
            assert len(worker.stored) <= NUM_BLOCKS

    @rule(data=st.data(), blocks=SETS)
    def remove(self, data, blocks):
        slot = self.slot(data)
        if slot is not None:
            self.index.remove(slot, blocks)
            self.workers[slot].stored.difference_update(blocks)

    @rule(data=st.data())
    def clear(self, data):
        slot = self.slot(data)
        if slot is not None:
            self.index.clear(slot)
            self.workers[slot].stored.clear()

    @rule(data=st.data(), blocks=SETS)
    def replace(self, data, blocks):
        slot = self.slot(data)
        if slot is None:
            return
        try:
            self.index.replace(slot, blocks)
        except TooManyBlocks:
            assert len(set(blocks)) > NUM_BLOCKS
        else:
            self.workers[slot].stored = set(blocks)
            self.workers[slot].confirm(blocks)

    @rule(target=reservations, data=st.data(), chain=CHAINS)
    def reserve(self, data, chain):
        slot = self.slot(data)
        if slot is None:
            return None
        worker = self.workers[slot]
        self.serial += 1
        worker.reserved[self.serial] = Counter(block for block in chain if block not in worker.stored)
        opened = (self.index.reserve(slot, chain), worker, self.serial)
        self.open.append(opened)
        return opened

    @rule(opened=consumes(reservations))
    def unreserve(self, opened):
        if opened is not None:
            self.open.remove(opened)
            self.end(*opened)

    @rule(opened=reservations)
    def unreserve_for_the_first_of_two_times(self, opened):
        if opened is not None:
            self.end(*opened)

    def end(self, reservation, worker, serial):
        self.index.unreserve(reservation)
        worker.reserved.pop(serial, None)

    @rule(chain=CHAINS)
    def overlaps(self, chain):
        self.is_true(chain, self.index.overlaps(chain))

    @rule(target=followed, chain=CHAINS)
    def follow(self, chain):
        return chain, Overlaps(self.index, chain)

    @rule(chain_and_overlaps=followed)
    def ask_again(self, chain_and_overlaps):
        chain, overlaps = chain_and_overlaps
        self.is_true(chain, overlaps())
        assert overlaps() is overlaps()  # nothing has changed

    def is_true(self, chain, found):
        assert set(found) == {slot for slot, worker in self.workers.items() if chain and chain[0] in worker.visible}
        for slot, depth in found.items():
            visible = self.workers[slot].visible
            assert chain[depth - 1] in visible
            assert depth == len(chain) or chain[depth] not in visible

    @rule(chain=CHAINS)
    def short_overlaps(self, chain):
        """Up to eight blocks behind the first one are all looked at, so holes are seen."""
        chain = chain[:9]
        depths = {slot: leading_blocks(chain, worker.visible) for slot, worker in self.workers.items()}
        assert self.index.overlaps(chain) == {slot: depth for slot, depth in depths.items() if depth}

    @rule()
    def the_same_blocks(self):
        """No invariant, for what is entered late must come in its place without being asked for after every step."""
        for slot, worker in self.workers.items():
            assert self.index.stored(slot) == worker.stored
            assert self.index.num_stored(slot) == len(worker.stored)
            assert self.index.num_reserved(slot) == len(worker.visible - worker.stored)
        assert len(self.index) == len(set().union(*(worker.visible for worker in self.workers.values())))

    def teardown(self):
        """Whatever happened, nothing is left once all requests and workers have ended."""
        self.the_same_blocks()
        for opened in self.open:
            self.end(*opened)
        for slot, worker in self.workers.items():
            assert self.index.num_reserved(slot) == 0
            self.index.remove(slot, worker.stored)
        assert len(self.index) == 0


def leading_blocks(chain, visible):
    """How many leading blocks are there; all of them count where the first one and the last one are."""
    if chain and chain[0] in visible and chain[-1] in visible:
        return len(chain)
    return next((depth for depth, block in enumerate(chain) if block not in visible), len(chain))


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


LENGTHS = st.integers(1, 40)
WORKERS = st.lists(st.sets(st.integers(0, 39)) | LENGTHS.map(range), min_size=1, max_size=6)


@given(LENGTHS, WORKERS)
def test_depths_with_and_without_holes(length, workers):
    """Exact for a worker that has a beginning of the chain, and the edge of a hole or of the end for another."""
    index = PrefixIndex()
    for blocks in workers:
        index.store(index.add_worker(40), blocks)
    found = index.overlaps(range(length))
    assert set(found) == {slot for slot, blocks in enumerate(workers) if 0 in blocks}
    for slot, depth in found.items():
        assert depth - 1 in workers[slot]
        assert depth == length or depth not in workers[slot]
