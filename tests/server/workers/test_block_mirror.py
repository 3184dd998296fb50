"""The worker's own copy of what its engine has stored."""

from array import array

from hypothesis import given
from hypothesis import strategies as st

from tests.server.workers.messages import BLOCK
from trtserve.plugins.api import (
    BlockHash,
    EngineConfig,
    KVCleared,
    KVRemoved,
    KVStored,
    Request,
    RequestId,
    SamplingParams,
    StoredBlock,
)
from trtserve.plugins.engines.sim.engine import SimEngine
from trtserve.server.workers import wire
from trtserve.server.workers.block_mirror import BlockMirror

FEW = st.integers(0, 9).map(BlockHash)  # few, so that events meet each other
EVENT = st.one_of(
    st.builds(KVStored, st.none(), st.lists(st.builds(StoredBlock, FEW, st.just(array("i"))), max_size=4).map(tuple)),
    st.builds(KVRemoved, st.lists(FEW, max_size=4).map(tuple)),
    st.just(KVCleared()),
)


def hashes(blocks):
    return sorted(wire.hashes_of(blocks.hashes))


@given(st.lists(st.lists(EVENT, max_size=4), max_size=12))
def test_it_is_what_the_events_say(steps):
    mirror, model, num_events = BlockMirror(), {}, 0
    for events in steps:
        assert mirror.apply(events) == num_events
        num_events += len(events)
        for event in events:
            match event:
                case KVStored(_, blocks):
                    model |= {block.hash: True for block in blocks}
                case KVRemoved(removed):
                    model = {block_hash: True for block_hash in model if block_hash not in removed}
                case KVCleared():
                    model = {}
        snapshot = mirror.snapshot()
        assert (snapshot.next_event, hashes(snapshot), len(mirror)) == (num_events, sorted(model), len(model))


@given(st.lists(BLOCK, max_size=5).map(tuple))
def test_hashes_of_64_bits_survive(blocks):
    mirror = BlockMirror()
    mirror.apply([KVStored(None, blocks)])
    assert hashes(mirror.snapshot()) == sorted({block.hash for block in blocks})


def test_it_has_what_an_engine_under_eviction_has():
    engine = SimEngine(EngineConfig("", num_blocks=8, options={"speedup": 1e12}))
    engine.start(lambda phase: None)
    mirror = BlockMirror()
    has_removed = False
    for number in range(1, 12):
        prompt = array("i", range(number * 40, number * 40 + 40))
        engine.add(Request(RequestId(number), prompt, SamplingParams(3)))
        while engine.has_work():
            events = engine.step().events
            has_removed |= any(isinstance(event, KVRemoved) for event in events)
            mirror.apply(events)
        pool = engine._started.pool
        assert len(mirror) == pool.num_stored
        assert len(pool.match(hashes(mirror.snapshot()), 99)) == pool.num_stored
    assert has_removed
