"""Whatever TensorRT-LLM stores and removes, what we tell adds up to the full blocks that are stored."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import KVCleared, KVRemoved, KVStored
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.engines.tensorrt_llm.events import EventTranslator
from trtserve.plugins.engines.tensorrt_llm.salts import Salts

SIZE = 2
FULL, NARROW = 4096, 128


def told(events, known=(), *, has_parents=True):
    """The blocks that whoever follows these events believes in, and the most of them there ever were."""
    known = set(known)
    most = len(known)
    for event in events:
        match event:
            case KVStored():
                assert event.parent is None or event.parent in known or not has_parents
                known |= {block.hash for block in event.blocks}
            case KVRemoved():
                known -= set(event.hashes)
            case KVCleared():
                known.clear()
        most = max(most, len(known))
    return known, most


def block(name, tokens, **more):
    units = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "tokens": units, "cache_level": 0, "priority": 35, **more}


def stored(parent, *blocks):
    return {"type": "stored", "parent_hash": parent, "blocks": list(blocks)}


def removed(*names):
    return {"type": "removed", "block_hashes": list(names)}


@dataclass
class TheirCache:
    """One rank's cache, and its numbered events. `chains` are the keys of its blocks: all tokens so far."""

    rank: int | None = None
    as_text: bool = False
    names: dict[tuple[int, ...], int | str] = field(default_factory=dict)
    next_id: int = 0
    next_name: int = 1

    def envelope(self, data, window=FULL):
        event = {"event_id": self.next_id, "data": data, "window_size": window}
        self.next_id += 1
        return event if self.rank is None else {**event, "attention_dp_rank": self.rank}

    def store(self, tokens):
        """The blocks of a sequence, the last one perhaps partial; None where all of them are there."""
        keys = [tuple(tokens[: end + SIZE]) for end in range(0, len(tokens), SIZE)]
        new = [key for key in keys if key not in self.names]
        if not new:
            return None
        begin = keys.index(new[0])
        parent = self.names[keys[begin - 1]] if begin else None
        for key in new:
            self.names[key] = f"{self.next_name:016x}" if self.as_text else self.next_name * 2**40
            self.next_name += 1
        blocks = [block(self.names[key], key[len(key) - (len(key) - 1) % SIZE - 1 :]) for key in new]
        return self.envelope(stored(parent, *blocks))

    def remove(self, place):
        """A block with all that follow it."""
        root = sorted(self.names)[place % len(self.names)]
        gone = [key for key in self.names if key[: len(root)] == root]
        return self.envelope(removed(*(self.names.pop(key) for key in gone)))

    def full_blocks(self):
        return {block_hashes(array("i", key), SIZE)[-1] for key in self.names if len(key) % SIZE == 0}


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)
steps = st.lists(st.one_of(tokens, st.integers(0, 50)), max_size=25)


def events_of(cache, steps):
    for step in steps:
        if isinstance(step, list):
            event = cache.store(step)
        else:
            event = cache.remove(step) if cache.names else None
        if event is not None:
            yield event


@given(st.lists(steps, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_exactly_what_is_stored_is_told(ranks, as_text, is_parallel):
    caches = [TheirCache(rank if is_parallel else None, as_text) for rank in range(len(ranks) if is_parallel else 1)]
    translator = EventTranslator(SIZE, Salts(SIZE), len(caches))
    streams = [[cache.envelope({"type": "created", "num_blocks_per_cache_level": [99, 7]})] for cache in caches]
    for stream, cache, steps in zip(streams, caches, ranks, strict=False):
        stream += list(events_of(cache, steps))
    believed = [set() for _ in caches]
    while any(streams):  # the ranks' streams are interleaved
        for stream in filter(None, streams):
            rank, events = translator.translate(stream.pop(0))
            believed[rank], _ = told(events, believed[rank])
    assert believed == [cache.full_blocks() for cache in caches]
    assert translator.num_blocks == 99
    assert translator.num_lost == 0


@given(steps, st.sets(st.integers(0, 25)), st.integers(1, 6))
def test_lost_events_never_make_more_blocks_than_there_are(steps, lost, capacity):
    cache, translator, known = TheirCache(), EventTranslator(SIZE, Salts(SIZE)), set()
    translator.bound(capacity)
    for event in events_of(cache, steps):
        if event["event_id"] in lost:
            continue
        _, events = translator.translate(event)
        known, most = told(events, known, has_parents=False)
        assert most <= capacity


def test_gaps_are_counted_for_each_rank():
    translator = EventTranslator(SIZE, Salts(SIZE), 2)
    for rank, event_id in ((0, 0), (1, 0), (0, 1), (1, 4)):
        translator.translate({"event_id": event_id, "data": removed(), "attention_dp_rank": rank})
    assert translator.num_lost == 3


def test_a_block_without_a_known_parent_is_left_out():
    translator = EventTranslator(SIZE, Salts(SIZE))
    orphan = stored(77, block(78, [5, 6]), block(79, [7, 8]))
    assert translator.translate({"event_id": 0, "data": orphan})[1] == []
    again = stored(None, block(77, [3, 4]))
    believed, _ = told(translator.translate({"event_id": 1, "data": again})[1])
    assert believed == set(block_hashes(array("i", [3, 4]), SIZE))


def test_a_name_that_is_given_to_another_block_removes_the_first():
    translator = EventTranslator(SIZE, Salts(SIZE))
    believed = set()
    for event_id, tokens in enumerate(([1, 1], [2, 2])):  # the `removed` between them was lost
        data = stored(None, block("name", tokens))
        believed, _ = told(translator.translate({"event_id": 2 * event_id, "data": data})[1], believed)
    assert believed == set(block_hashes(array("i", [2, 2]), SIZE))


def test_two_names_of_one_block():
    translator = EventTranslator(SIZE, Salts(SIZE))
    believed = set()
    for event_id, data in enumerate([stored(None, block(1, [3, 4])), stored(None, block(2, [3, 4])), removed(1)]):
        believed, _ = told(translator.translate({"event_id": event_id, "data": data})[1], believed)
    assert len(believed) == 1
    assert told(translator.translate({"event_id": 3, "data": removed(2)})[1], believed) == (set(), 1)


@pytest.mark.parametrize("windows", [(FULL, NARROW), (NARROW, FULL)])
def test_only_the_widest_window_counts(windows):
    translator = EventTranslator(SIZE, Salts(SIZE))
    believed, event_id = set(), 0

    def take(window, data):
        nonlocal believed, event_id
        event = {"event_id": event_id, "window_size": window, "data": data}
        believed, _ = told(translator.translate(event)[1], believed)
        event_id += 1

    for window in windows:
        take(window, {"type": "created", "num_blocks_per_cache_level": [window, 0]})
        take(window, stored(None, block(1, [window % 7, 4])))
    take(NARROW, removed(1))
    assert believed == set(block_hashes(array("i", [FULL % 7, 4]), SIZE))
    assert translator.num_blocks == FULL
    assert translator.num_lost == 0


def test_blocks_in_host_memory_are_still_there():
    translator = EventTranslator(SIZE, Salts(SIZE))
    believed, _ = told(translator.translate({"event_id": 0, "data": stored(None, block(1, [3, 4]))})[1])
    moved = {"type": "updated", "block_hash": 1, "cache_level": {"new_value": 1, "old_value": 0}, "priority": None}
    for data in (moved, {"type": "something of a later version"}):
        assert translator.translate({"event_id": 1, "data": data})[1] == []
    assert len(believed) == 1


@pytest.mark.parametrize(
    "event",
    [
        {"event_id": 1},
        {"event_id": 1, "data": {}},
        {"event_id": 1, "data": {"type": "stored", "parent_hash": None}},
        {"event_id": 1, "data": stored(None, block(1, [3, 4]), block(3, [2**40, 4]))},
        {"event_id": 1, "data": {"type": "created", "num_blocks_per_cache_level": []}},
        {"event_id": 1, "data": removed(), "attention_dp_rank": 1},
        {"event_id": 1, "data": removed(), "attention_dp_rank": -1},
    ],
)
def test_nonsense_changes_nothing(event):
    translator = EventTranslator(SIZE, Salts(SIZE))
    with pytest.raises((LookupError, TypeError, ValueError, ArithmeticError)):
        translator.translate(event)
    child = {"event_id": 2, "data": stored(1, block(9, [5, 6]))}
    assert translator.translate(child)[1] == []  # no block of it was kept
