"""KV that one engine computed continues identically in another."""

from __future__ import annotations

from array import array

import pytest

from trtserve.plugins.api import KVStored
from trtserve.plugins.engines.torch.block_pool import OutOfBlocks

PROMPT = [3 + number * 7 % 300 for number in range(75)]


@pytest.fixture
def source(tiny_llama, runner_of):
    runner = runner_of(tiny_llama)
    runner.generate([PROMPT], max_tokens=1)
    return runner


@pytest.mark.parametrize("num_here", [0, 20, 75])
def test_the_continuation_is_the_same(num_here, source, tiny_llama, runner_of):
    target = runner_of(tiny_llama)
    if num_here:
        target.generate([PROMPT[:num_here]], max_tokens=1)
    prefix = source.engine.export_prefix(array("i", PROMPT))
    assert prefix.num_tokens == 64
    assert target.engine.import_prefix(array("i", PROMPT), prefix) == 4 - num_here // 16
    (given,) = target.generate([PROMPT], max_tokens=20)
    (wanted,) = source.generate([PROMPT], max_tokens=20)
    assert given.cached_tokens == 64
    assert given.tokens == wanted.tokens
    assert target.engine.stats().free_blocks == 256
    stored = [block.hash for event in target.events if isinstance(event, KVStored) for block in event.blocks]
    assert len(stored) == len(set(stored))


def test_the_blocks_came_over_and_were_not_computed_again(source, tiny_llama, runner_of):
    target = runner_of(tiny_llama)
    prefix = source.engine.export_prefix(array("i", PROMPT))
    target.engine.import_prefix(array("i", PROMPT), prefix)
    assert target.engine.has_work()  # events to report
    target.drain()
    again = target.engine.export_prefix(array("i", PROMPT))
    assert again.data.equal(prefix.data)
    assert target.steps[-1].stats is None


def test_salts_do_not_mix(source, tiny_llama, runner_of):
    assert source.engine.export_prefix(array("i", PROMPT), "other").num_tokens == 0


def test_another_layout_is_refused(source, tiny_llama, runner_of):
    prefix = source.engine.export_prefix(array("i", PROMPT))
    with pytest.raises(ValueError, match="same model, dtype and block size"):
        runner_of(tiny_llama, block_size=8).engine.import_prefix(array("i", PROMPT), prefix)


def test_no_room_changes_nothing(source, tiny_llama, runner_of):
    prefix = source.engine.export_prefix(array("i", PROMPT))
    target = runner_of(tiny_llama, num_blocks=3)
    with pytest.raises(OutOfBlocks):
        target.engine.import_prefix(array("i", PROMPT), prefix)
    assert target.engine.stats().free_blocks == 3
    assert not target.engine.has_work()
