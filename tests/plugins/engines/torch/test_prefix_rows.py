"""KV that one engine computed continues identically in another, through rows of memory."""

from __future__ import annotations

from array import array
from ctypes import string_at
from dataclasses import replace

import pytest
import torch

from trtserve.plugins.api import KVRemoved, KVStored
from trtserve.plugins.conformance.engine_kv import host_rows
from trtserve.plugins.engines.torch.model import prepare_model
from trtserve.plugins.engines.torch.options import TorchOptions

PROMPT = array("i", (3 + number * 7 % 300 for number in range(75)))
NUM_ROWS = 16


@pytest.fixture
def engines(tiny_llama, tiny_llama_folder, runner_of):
    """Two runners that share their rows, and the rows: engines(num_blocks=…) for the second one."""

    def make(**config):
        runners = runner_of(tiny_llama, tiny_llama_folder), runner_of(tiny_llama, tiny_llama_folder, **config)
        rows = host_rows(runners[0].engine.kv_layout(), NUM_ROWS)
        for runner in runners:
            runner.engine.attach_rows(rows)
        return *runners, rows

    return make


def test_layouts_differ_by_model_dtype_and_block_size(tiny_module, tiny_llama, tiny_llama_folder, tmp_path, runner_of):
    other_folder = tmp_path / "other"
    tiny_module("LlamaConfig", num_hidden_layers=2, rope_theta=5e4).save_pretrained(other_folder)
    rounded = prepare_model(tiny_module("LlamaConfig"), torch.bfloat16, torch.device("cpu"), TorchOptions())
    layouts = [
        runner_of(tiny_llama, tiny_llama_folder).engine.kv_layout(),
        runner_of(tiny_llama, other_folder).engine.kv_layout(),
        runner_of(tiny_llama, tiny_llama_folder, block_size=8).engine.kv_layout(),
        runner_of(rounded, tiny_llama_folder, dtype="bfloat16").engine.kv_layout(),
    ]
    assert len({layout.fingerprint for layout in layouts}) == 4
    # 4 layers of 2 heads of 16 numbers, keys and values
    assert [layout.block_bytes for layout in layouts] == [16384, 16384, 8192, 8192]
    assert {layout.device for layout in layouts} == {"cpu"}


@pytest.mark.parametrize("wrong", [{"row_bytes": 16380}, {"row_bytes": 8192}, {"device": "cuda:0"}])
def test_rows_that_do_not_fit_are_refused(wrong, tiny_llama, tiny_llama_folder, runner_of):
    engine = runner_of(tiny_llama, tiny_llama_folder).engine
    with pytest.raises(ValueError, match="as kv_layout says"):
        engine.attach_rows(replace(host_rows(engine.kv_layout(), 2), **wrong))


def test_rows_have_to_be_aligned(tiny_llama, tiny_llama_folder, runner_of):
    engine = runner_of(tiny_llama, tiny_llama_folder).engine
    rows = host_rows(engine.kv_layout(), 2)
    with pytest.raises(ValueError, match="align"):
        engine.attach_rows(replace(rows, address=rows.address + 2, num_rows=1))


def test_only_rows_that_are_there_are_touched(engines, tiny_llama, tiny_llama_folder, runner_of):
    source, target, _ = engines()
    source.generate([PROMPT], max_tokens=1)
    for rows in ([-1, 0], [0, NUM_ROWS]):
        with pytest.raises(IndexError, match="16 rows are attached"):
            source.engine.read_kv(PROMPT, "", 0, rows)
        with pytest.raises(IndexError, match="16 rows are attached"):
            target.engine.write_kv(PROMPT, "", 0, rows)
    with pytest.raises(IndexError, match="0 rows are attached"):
        runner_of(tiny_llama, tiny_llama_folder).engine.read_kv(PROMPT, "", 0, [0])
    with pytest.raises(ValueError, match="more than the full blocks"):
        target.engine.write_kv(PROMPT, "", 2, [0, 1, 2])
    assert target.engine.stats().free_blocks == 256 and not target.engine.has_work()


def test_a_row_holds_the_bytes_of_its_block_and_no_other_row_changes(engines):
    source, target, rows = engines()
    source.generate([PROMPT], max_tokens=1)
    source.engine.read_kv(PROMPT, "", 0, [9, 2])
    target.engine.write_kv(PROMPT, "", 0, [9, 2])
    assert target.engine.read_kv(PROMPT, "", 0, [4, 5, 6]) == 2
    row = [bytes_of(rows, number) for number in range(NUM_ROWS)]
    assert row[4] == row[9] and row[5] == row[2] and row[4] != row[5]
    assert any(row[9]) and any(row[2])
    assert not any(any(row[number]) for number in range(NUM_ROWS) if number not in (2, 4, 5, 9))


def test_written_blocks_are_events_and_nothing_is_computed_for_them(engines):
    source, target, _ = engines()
    source.generate([PROMPT], max_tokens=1)
    source.engine.read_kv(PROMPT, "", 0, range(4))
    assert not target.engine.has_work()
    target.engine.write_kv(PROMPT, "", 0, range(4))
    assert target.engine.has_work()
    target.drain()
    (event,) = target.events
    assert isinstance(event, KVStored) and [len(block.token_ids) for block in event.blocks] == [16] * 4
    assert [step.stats for step in target.steps] == [None]


def test_blocks_of_running_sequences_are_never_evicted(engines):
    source, target, _ = engines(num_blocks=8)
    source.generate([PROMPT], max_tokens=1)
    source.engine.read_kv(PROMPT, "", 0, range(4))
    running = target.add([5 + place % 40 for place in range(83)], max_tokens=12)
    target.step()
    assert target.engine.stats().free_blocks == 2
    assert target.engine.write_kv(PROMPT, "", 0, range(4)) == 2
    assert target.engine.stats().free_blocks == 2
    (wanted,) = source.generate([[5 + place % 40 for place in range(83)]], max_tokens=12)
    assert target.drain()[running].tokens == wanted.tokens
    assert target.engine.stats().preemptions_total == 0


def test_without_any_room_nothing_changes(engines):
    source, target, _ = engines(num_blocks=6)
    source.generate([PROMPT], max_tokens=1)
    source.engine.read_kv(PROMPT, "", 0, range(4))
    target.add([5 + place % 40 for place in range(93)], max_tokens=2)
    target.step()
    assert target.engine.stats().free_blocks == 0
    assert target.engine.write_kv(PROMPT, "", 0, range(4)) == 0
    target.drain()
    assert not any(isinstance(event, KVRemoved) for event in target.events)


def bytes_of(rows, number):
    start = rows.address + number * rows.row_bytes
    return string_at(start, rows.row_bytes)
