"""KV of the simulated engine: rows whose bytes say which block they hold, and a cache that takes no others."""

from array import array
from ctypes import c_char, memmove, string_at
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trtserve.plugins.api import (
    EngineConfig,
    FinishReason,
    KVStored,
    Request,
    RequestId,
    RequestRefused,
    SamplingParams,
)
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.conformance.engine_cache import stored_after
from trtserve.plugins.conformance.engine_kv import host_rows
from trtserve.plugins.engines.sim.engine import SimEngine
from trtserve.plugins.engines.sim.options import SimOptions
from trtserve.plugins.engines.sim.prefix_rows import RowPattern, WrongKVBytes

BLOCK = 4
PROMPT = array("i", range(100, 100 + 4 * BLOCK + 2))
FAULT = 77


def started(num_blocks=32, **options) -> SimEngine:
    options = {"speedup": 1e12, "vocab_size": 1000, "kv_block_bytes": 100, **options}
    engine = SimEngine(EngineConfig("", block_size=BLOCK, num_blocks=num_blocks, options=options))
    engine.start(lambda phase: None)
    return engine


def request(number, prompt, max_tokens=4, num_resumed=0) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(RequestId(number), array("i", prompt), sampling, num_resumed=num_resumed)


def finish(engine):
    """All steps until there is no work."""
    steps = []
    while engine.has_work():
        steps.append(engine.step())
        assert len(steps) < 1000
    return steps


@pytest.fixture
def rows():
    """Eight rows, of which the first four hold the prompt's blocks."""
    engine = started()
    rows = host_rows(engine.kv_layout(), 8)
    engine.attach_rows(rows)
    engine.add(request(1, PROMPT, max_tokens=1))
    finish(engine)
    assert engine.read_kv(PROMPT, "", 0, range(4)) == 4
    return rows


@pytest.fixture
def engine(rows):
    engine = started()
    engine.attach_rows(rows)
    return engine


def test_a_row_is_the_same_in_every_process():
    row = RowPattern(40).row(block_hashes(PROMPT, BLOCK)[0])
    assert row.hex() == "54b29110cf699e90c44fd8ee4616899af92947c4847daaaeb91ebb7411742a6cd7f09d0b7848a9db"
    assert RowPattern(64).row(block_hashes(PROMPT, BLOCK)[0])[:40] == row


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(64, 400))
@settings(max_examples=50)
def test_rows_of_different_blocks_differ_in_every_stretch(one, other, size):
    pattern = RowPattern(size)
    rows = pattern.row(one), pattern.row(other)
    assert [len(row) for row in rows] == [size, size]
    stretches = [{row[start : start + 16] for start in range(size - 15)} for row in rows]
    assert len(stretches[0]) == size - 15, "no part of a row looks like another part of it"
    if one != other:
        assert all(rows[0][start : start + 16] != rows[1][start : start + 16] for start in range(size - 15))


@given(place=st.integers(0, 399), flip=st.integers(1, 255))
@settings(max_examples=30)
def test_one_wrong_byte_is_found_and_nothing_is_stored(place, flip):
    source, target = started(), started()
    rows = host_rows(source.kv_layout(), 4)
    for engine in (source, target):
        engine.attach_rows(rows)
    source.add(request(1, PROMPT, max_tokens=1))
    finish(source)
    source.read_kv(PROMPT, "", 0, range(4))
    memory = (c_char * 400).from_address(rows.address)
    memory[place] = memory.raw[place] ^ flip
    with pytest.raises(WrongKVBytes, match=f"Row {place // 100} does not hold block {place // 100} of its prompt"):
        target.write_kv(PROMPT, "", 0, range(4))
    assert target.stored_blocks(PROMPT, "") == 0
    assert not target.has_work()


def swap(rows):
    return [1, 0, 2, 3]


def shift(rows):
    memmove(rows.address + 1, string_at(rows.address, 399), 399)
    return range(4)


def tear(rows):
    memmove(rows.address + 200, string_at(rows.address + 300, 50), 50)
    return range(4)


def forget(rows):
    return [0, 1, 2, 7]


@pytest.mark.parametrize("damage", [swap, shift, tear, forget])
def test_rows_that_a_transfer_got_wrong_are_found(damage, rows, engine):
    with pytest.raises(WrongKVBytes):
        engine.write_kv(PROMPT, "", 0, damage(rows))
    assert engine.stored_blocks(PROMPT, "") == 0


def test_rows_under_another_salt_or_of_other_tokens_are_refused(engine):
    with pytest.raises(WrongKVBytes):
        engine.write_kv(PROMPT, "other", 0, range(4))
    with pytest.raises(WrongKVBytes):
        engine.write_kv(array("i", [1, *PROMPT[1:]]), "", 0, range(4))
    assert engine.write_kv(PROMPT, "", 0, range(4)) == 4


def test_what_does_not_fit_is_refused(rows, engine):
    with pytest.raises(ValueError, match="as kv_layout says"):
        engine.attach_rows(replace(rows, row_bytes=99))
    with pytest.raises(ValueError, match="as kv_layout says"):
        engine.attach_rows(replace(rows, device="cuda:0"))
    with pytest.raises(IndexError, match="8 rows are attached"):
        engine.read_kv(PROMPT, "", 4, [8])
    with pytest.raises(IndexError, match="0 rows are attached"):
        started().write_kv(PROMPT, "", 0, [0])
    with pytest.raises(ValueError, match="more than the 4 full blocks"):
        engine.write_kv(PROMPT, "", 2, range(3))
    with pytest.raises(RuntimeError, match="call start first"):
        SimEngine(EngineConfig("")).kv_layout()


def test_moving_takes_no_time_and_is_told_at_once(engine):
    engine.write_kv(PROMPT, "", 0, range(4))
    assert engine.has_work()
    (step,) = finish(engine)
    (event,) = step.events
    assert step.stats is None and not step.outputs
    assert isinstance(event, KVStored) and event.parent is None
    assert tuple(block.hash for block in event.blocks) == block_hashes(PROMPT, BLOCK)


def test_blocks_of_running_sequences_are_never_evicted(rows):
    engine = started(num_blocks=8)
    engine.attach_rows(rows)
    engine.add(request(1, range(23), max_tokens=2))
    engine.step()
    assert engine.stats().free_blocks == 2
    assert engine.write_kv(PROMPT, "", 0, range(4)) == 2
    assert [block.hash for block in finish(engine)[-1].events[0].blocks] == list(block_hashes(PROMPT, BLOCK)[:2])
    assert engine.stats().preemptions_total == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "generate", "step"]), st.integers(0, 2), st.integers(0, 6)), max_size=25
    )
)
@settings(max_examples=60, deadline=None)
def test_the_cache_stays_whole_whatever_is_written(moves):
    engine, layout = started(num_blocks=9), started().kv_layout()
    rows = host_rows(layout, 6)
    engine.attach_rows(rows)
    memory, pattern = (c_char * 600).from_address(rows.address), RowPattern(100)
    prompts = [array("i", range(number, number + 6 * BLOCK)) for number in range(3)]
    events = []
    for number, (move, which, count) in enumerate(moves):
        prompt = prompts[which]
        if move == "write":
            for place, block_hash in enumerate(block_hashes(prompt, BLOCK)):
                memory[place * 100 : place * 100 + 100] = pattern.row(block_hash)
            written = engine.write_kv(prompt, "", 0, range(count))
            assert written == min(count, engine.stored_blocks(prompt, ""))
        elif move == "generate" and count:
            engine.add(request(number, prompt[: count * BLOCK - 1], max_tokens=3))
        elif engine.has_work():
            events += engine.step().events
    for step in finish(engine):
        events += step.events
    assert engine.stats().free_blocks == 9
    stored = stored_after(events, 9)
    for prompt in prompts:
        hashes = block_hashes(prompt, BLOCK)
        assert stored.issuperset(hashes[: engine.stored_blocks(prompt, "")])


@pytest.mark.parametrize("num_resumed", [-1, 3, 4])
def test_a_request_cannot_be_all_resumed(num_resumed):
    with pytest.raises(RequestRefused, match="one at least has to be there before"):
        started().add(request(1, [1, 2, 3], num_resumed=num_resumed))


def test_a_resumed_token_is_no_prompt_that_asks_for_a_fault():
    engine = started(fault_token_id=FAULT, fault_kind="error")
    engine.add(request(1, [1, FAULT], num_resumed=1))
    engine.add(request(2, [FAULT, 1], num_resumed=1))
    reasons = {output.request_id: output.finish_reason for step in finish(engine) for output in step.outputs}
    assert reasons == {1: FinishReason.LENGTH, 2: FinishReason.ERROR}


def test_a_fault_comes_after_tokens_of_both_workers():
    engine = started(fault_token_id=FAULT, fault_kind="error", fault_after_tokens=5)
    engine.add(request(1, [FAULT, 1, 2, 3], num_resumed=3, max_tokens=9))
    outputs = [output for step in finish(engine) for output in step.outputs]
    assert sum(len(output.token_ids) for output in outputs) == 2
    assert outputs[-1].finish_reason is FinishReason.ERROR


def test_a_rows_size_is_an_option_with_bounds():
    assert started(kv_block_bytes=None).kv_layout().block_bytes == 1024 * BLOCK
    assert started(kv_block_bytes=64).kv_layout().fingerprint != started().kv_layout().fingerprint
    for size in (63, 2**24 + 1):
        with pytest.raises(ValidationError):
            SimOptions(kv_block_bytes=size)
