"""Kept rows hold, bit by bit, what the KV store holds, whatever comes, goes, grows or is preempted in between."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.engines.torch.test_scheduler import SIZE, sequence_of
from trtserve.plugins.engines.torch.attention_terms import AttentionTerms
from trtserve.plugins.engines.torch.batch import pack
from trtserve.plugins.engines.torch.decode_rows import DecodeRows
from trtserve.plugins.engines.torch.kv_store import KVStore, LayerShape
from trtserve.plugins.engines.torch.prefix_cache import PrefixCache
from trtserve.plugins.engines.torch.scheduler import Scheduler

CPU = torch.device("cpu")
LAYERS = (LayerShape(2, 4, 4), LayerShape(1, 6, 2))
HEADS = 2
TERMS = AttentionTerms(0.5, None, None, None)


class Machine:
    """A real scheduler, store and rows; the model's keys and values are random numbers."""

    def __init__(self, num_blocks=40, row_blocks=40, max_num_tokens=24):
        self.store = KVStore(LAYERS, num_blocks, SIZE, torch.float32, CPU)
        self.rows = DecodeRows(self.store, row_blocks)
        cache = PrefixCache(num_blocks, SIZE)
        self.scheduler = Scheduler(cache, min(8, max_num_tokens), max_num_tokens)
        self.live = []
        self.next_id = 1
        self.paths = Counter()

    def add(self, num_prompt, max_tokens=400):
        # every second prompt begins alike, so that blocks are shared
        sequence = sequence_of(self.next_id, num_prompt, max_tokens, first=100 * (self.next_id % 2 * self.next_id))
        self.next_id += 1
        self.live.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def end(self, number):
        if self.live:
            sequence = self.live.pop(number % len(self.live))
            self.scheduler.remove(sequence.request.id)

    def step(self):
        """One pass, checked; returns how many rows were filled anew, None where rows were not used."""
        work = self.scheduler.schedule()
        if not work:
            return None
        batch = pack(work, self.store, {}, self.rows)
        num_tokens = batch.input_ids.shape[1]
        for layer, shape in enumerate(LAYERS):
            query = torch.randn(HEADS, num_tokens, shape.key_dim)
            key, value = (torch.randn(shape.kv_heads, num_tokens, dim) for dim in (shape.key_dim, shape.value_dim))
            if shape.key_dim == shape.value_dim and self.paths.total() % 2:
                joined = torch.cat([query, key, value]).transpose(0, 1)
                assert batch.paged.attend_joined(layer, joined, HEADS, TERMS).isfinite().all()
            else:
                assert batch.paged.attend(layer, query, key, value, TERMS).isfinite().all()
        batch.paged.finish()
        self.check(batch, [item.sequence for item in work if item.count == 1])
        self.scheduler.complete(work)
        for sequence in batch.sampled:
            sequence.tokens.append(len(sequence.tokens) % 1000)
        update = batch.paged.rows
        self.paths["none" if not batch.paged.decodes else "copies" if update is None else "rows"] += 1
        return None if update is None else len(update.fresh)

    def check(self, batch, singles):
        """Each row of each group is one decoding sequence, as the store has it."""
        by_slot = {self.slot_of(sequence, sequence.num_computed): sequence for sequence in singles}
        place = 0
        for group in batch.paged.decodes:
            assert group.start == place
            for row, length in enumerate(group.lengths.tolist()):
                sequence = by_slot.pop(int(batch.paged.slots[place + row]))
                assert length == sequence.num_computed + 1
                slots = torch.tensor([self.slot_of(sequence, position) for position in range(length)])
                for layer in range(len(LAYERS)):
                    assert torch.equal(group.kv.keys(layer)[row, :, :length], self.store.keys[layer][:, slots])
                    assert torch.equal(group.kv.values(layer)[row, :, :length], self.store.values[layer][:, slots])
            place += len(group.lengths)
        assert not by_slot

    def slot_of(self, sequence, position):
        return sequence.block_ids[position // SIZE] * SIZE + position % SIZE


ROUNDS = st.lists(
    st.tuples(st.lists(st.integers(1, 60), max_size=2), st.lists(st.integers(0, 7), max_size=1), st.integers(1, 9)),
    min_size=3,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(num_blocks=st.integers(30, 60), row_blocks=st.integers(8, 90), max_num_tokens=st.integers(2, 24), rounds=ROUNDS)
def test_rows_hold_what_the_store_holds(num_blocks, row_blocks, max_num_tokens, rounds):
    machine = Machine(num_blocks, row_blocks, max_num_tokens)
    for prompts, ends, steps in rounds:
        for num_prompt in prompts:
            machine.add(num_prompt)
        for number in ends:
            machine.end(number)
        for _ in range(steps):
            longest = max((len(sequence.tokens) for sequence in machine.live), default=0)
            if longest < (num_blocks - 1) * SIZE:  # else no engine would go on
                machine.step()


def test_a_step_fills_nothing_but_what_is_new():
    machine = Machine(row_blocks=400)
    for num_prompt in (6, 3, 9):
        machine.add(num_prompt)
    machine.step()
    assert [machine.step() for _ in range(5)] == [3, 0, 0, 0, 0]
    machine.end(0)  # the second longest
    assert [machine.step(), machine.step()] == [1, 0]  # the last row moves into the gap
    machine.add(5)
    assert sum(machine.step() for _ in range(3)) == 1
    assert machine.step() == 0


def test_a_long_prompt_that_gets_one_token_a_step_stays_in_its_row():
    machine = Machine(num_blocks=60, row_blocks=16, max_num_tokens=4)
    for _ in range(3):
        machine.add(2)
    for _ in range(3):
        machine.step()
    machine.add(50)
    assert [machine.step() for _ in range(4)] == [4, 0, 0, 0]  # four rows have less room than three


def test_a_sequence_that_outgrows_its_row_gets_more_room():
    machine = Machine(num_blocks=400, row_blocks=400)
    machine.add(3)
    machine.add(4)
    machine.step()
    filled = [machine.step() for _ in range(600)]
    assert filled.count(0) == len(filled) - 3  # at first, and where 256 tokens of room were used up
    assert {count for count in filled if count} == {2}


def test_preempted_sequences_come_back_to_rows_that_are_filled_again():
    machine = Machine(num_blocks=14, row_blocks=14)
    for _ in range(3):
        machine.add(10)
    for _ in range(30):
        machine.step()
    assert machine.scheduler.preemptions_total > 0 and machine.paths["rows"] > 0


def test_too_little_memory_falls_back_to_copies_and_returns():
    machine = Machine(num_blocks=60, row_blocks=8)
    machine.add(10)
    machine.step()
    machine.step()
    machine.add(30)
    for _ in range(4):
        machine.step()
    assert machine.paths["copies"] >= 2
    machine.end(1)
    assert [machine.step(), machine.step()] == [1, 0]
