"""The conformance suite of engines whose prefix cache can be read and written as rows (`KVStoreEngine`).

Write a test module with a fixture `kv_engine_under_test` and import the tests into it, beside those of
`trtserve.plugins.conformance.engine`:

    from trtserve.plugins.conformance.engine_kv import *

    @pytest.fixture
    def kv_engine_under_test(engine_under_test):
        return KVEngineCase(engine_under_test)

`EngineCase.make` has to give a `Driver` around the engine. Each test starts one or two engines of equal configuration,
which share the rows: what the first one reads out of its prefix cache the second one writes into its own. Give
`make_rows` where rows aren't host memory. The suite needs 20 blocks a sequence and prefix caching.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from typing import Any, cast

import pytest

from trtserve.plugins.api import (
    FinishReason,
    KVLayout,
    KVRows,
    KVStored,
    KVStoreEngine,
    TokenIds,
)
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.conformance.case import EngineCase, RunningEngine
from trtserve.plugins.conformance.engine_cache import stored_after
from trtserve.plugins.driver import Driver

__all__ = [
    "KVEngineCase",
    "KVSide",
    "host_rows",
    "test_a_block_without_those_before_it_is_not_stored",
    "test_a_prompt_continues_alike_elsewhere",
    "test_a_write_counts_for_the_request_after_it",
    "test_blocks_come_in_parts",
    "test_events_tell_of_written_blocks_when_idle",
    "test_layouts_are_equal_only_where_rows_are",
    "test_nothing_is_read_or_written_when_caching_is_off",
    "test_other_salts_see_nothing",
    "test_resumed_requests_go_on_alike",
    "test_resuming_more_than_the_prompt_is_refused",
    "test_what_is_there_is_kept",
    "test_writing_evicts_and_stops_where_the_cache_is_full",
]

_ALIGNMENT = 64
_SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"presence_penalty": 0.9, "frequency_penalty": 0.6, "repetition_penalty": 1.2},
    "seeded": {"temperature": 1.1, "top_p": 0.95, "top_k": 50, "seed": 11},
    "seeded and penalised": {"temperature": 0.9, "seed": -3, "presence_penalty": 1.5, "frequency_penalty": 0.5},
}


def host_rows(layout: KVLayout, num_rows: int) -> KVRows:
    """Rows in memory of this process."""
    memory = create_string_buffer(num_rows * layout.block_bytes + _ALIGNMENT)
    address = -(-addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    return KVRows(address, num_rows, layout.block_bytes, layout.device, memory)


@dataclass(frozen=True, slots=True)
class KVSide:
    """A running engine with rows attached; every call is made on the driver's thread and waited for."""

    running: RunningEngine
    driver: Driver
    kv: KVStoreEngine

    @property
    def block_size(self) -> int:
        return self.running.info.block_size

    def attach(self, rows: KVRows) -> None:
        """`attach_rows`."""
        self.driver.call(lambda: self.kv.attach_rows(rows)).result(self.running.deadline_s)

    def stored(self, tokens: TokenIds, cache_salt: str = "") -> int:
        """`stored_blocks`."""
        return self.driver.call(lambda: self.kv.stored_blocks(tokens, cache_salt)).result(self.running.deadline_s)

    def read(self, tokens: TokenIds, first_block: int, rows: Sequence[int], cache_salt: str = "") -> int:
        """`read_kv`."""
        call = self.driver.call(lambda: self.kv.read_kv(tokens, cache_salt, first_block, rows))
        return call.result(self.running.deadline_s)

    def write(self, tokens: TokenIds, first_block: int, rows: Sequence[int], cache_salt: str = "") -> int:
        """`write_kv`."""
        call = self.driver.call(lambda: self.kv.write_kv(tokens, cache_salt, first_block, rows))
        return call.result(self.running.deadline_s)


@dataclass(frozen=True, slots=True)
class KVEngineCase:
    """An engine to put under test, and how to allocate rows for it."""

    engine: EngineCase
    make_rows: Callable[[KVLayout, int], KVRows] = host_rows
    num_rows: int = 32

    @contextmanager
    def side(self, **changes: Any) -> Iterator[KVSide]:
        """A started engine without rows."""
        with self.engine.running(**{"enable_prefix_caching": True, **changes}) as running:
            assert isinstance(running.engine, Driver), "EngineCase.make has to give a Driver"
            yield KVSide(running, running.engine, cast(KVStoreEngine, running.engine.engine))

    @contextmanager
    def pair(self, **changes: Any) -> Iterator[tuple[KVSide, KVSide]]:
        """Two of them, the second with these changes, which share their rows."""
        with self.side() as source, self.side(**changes) as target:
            rows = self.make_rows(source.kv.kv_layout(), self.num_rows)
            source.attach(rows)
            target.attach(rows)
            yield source, target

    def prompt(self, num_blocks: int, more: int = 5, number: int = 0) -> TokenIds:
        """A prompt of so many blocks and `more` tokens."""
        return self.engine.prompt(num_blocks * self.engine.config.block_size + more, number)


def test_layouts_are_equal_only_where_rows_are(kv_engine_under_test: KVEngineCase) -> None:
    with kv_engine_under_test.pair() as (source, target):
        layout = source.kv.kv_layout()
        assert layout == target.kv.kv_layout() == source.kv.kv_layout()
        assert layout.fingerprint and layout.block_bytes > 0
    with kv_engine_under_test.side(block_size=2 * kv_engine_under_test.engine.config.block_size) as other:
        assert other.kv.kv_layout().fingerprint != layout.fingerprint


def test_a_prompt_continues_alike_elsewhere(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(3)
    with kv_engine_under_test.pair() as (source, target):
        assert source.stored(prompt) == source.read(prompt, 0, [4, 5, 6]) == 0
        source.running.generate(prompt, max_tokens=1)
        assert source.stored(prompt) == 3
        assert source.read(prompt, 0, [7, 2, 5]) == 3
        assert target.write(prompt, 0, [7, 2, 5]) == 3
        assert target.stored(prompt) == 3
        given, wanted = (side.running.generate(prompt, max_tokens=12) for side in (target, source))
        assert given.cached_tokens == 3 * target.block_size
        assert given.token_ids == wanted.token_ids
        assert target.read(prompt, 0, [8, 9, 10]) == 3, "what was written can be read again"
        assert target.running.engine.stats().free_blocks == source.running.engine.stats().free_blocks


def test_a_write_counts_for_the_request_after_it(kv_engine_under_test: KVEngineCase) -> None:
    prompt, rows = kv_engine_under_test.prompt(2), [0, 1]
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1)
        source.read(prompt, 0, rows)
        target.driver.call(lambda: target.kv.write_kv(prompt, "", 0, rows))
        assert target.running.generate(prompt).cached_tokens == 2 * target.block_size


@pytest.mark.parametrize("sampling", _SAMPLING.values(), ids=_SAMPLING)
def test_resumed_requests_go_on_alike(kv_engine_under_test: KVEngineCase, sampling: dict[str, Any]) -> None:
    prompt, total = kv_engine_under_test.prompt(2, more=6), 14
    with kv_engine_under_test.pair() as (source, target):
        logprobs = {"logprobs": 1} if source.running.info.supports_logprobs else {}
        stop = source.running.generate(prompt, max_tokens=total, **sampling).token_ids[-1]
        asked = {**sampling, **logprobs, "stop_token_ids": (stop,)}
        whole = source.running.generate(prompt, max_tokens=total, min_tokens=6, **asked)
        source.read(prompt, 0, [0, 1])
        target.write(prompt, 0, [0, 1])
        for count in range(1, len(whole.token_ids)):
            so_far = prompt + array("i", whole.token_ids[:count])
            rest = target.running.generate(
                so_far, num_resumed=count, max_tokens=total - count, min_tokens=max(0, 6 - count), **asked
            )
            assert rest.token_ids == whole.token_ids[count:]
            assert rest.finish_reason is whole.finish_reason
            assert rest.cached_tokens is not None and rest.cached_tokens >= 2 * target.block_size
            assert [logprob.token_id for logprob in rest.logprobs] == (rest.token_ids if logprobs else [])


def test_resuming_more_than_the_prompt_is_refused(kv_engine_under_test: KVEngineCase) -> None:
    with kv_engine_under_test.side() as side:
        prompt = kv_engine_under_test.prompt(1)
        for num_resumed in (-1, len(prompt), len(prompt) + 1):
            ended = side.running.generate(prompt, num_resumed=num_resumed)
            assert ended.finish_reason is FinishReason.ERROR
            assert ended.error
        assert len(side.running.generate(prompt, num_resumed=len(prompt) - 1, max_tokens=3).token_ids) == 3


def test_blocks_come_in_parts(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(5)
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1)
        assert source.read(prompt, 0, [3]) == 1
        assert target.write(prompt, 0, [3]) == 1
        assert source.read(prompt, 3, [5, 6, 7, 8]) == 2, "only full blocks are stored"
        assert source.read(prompt, 1, [3, 4]) == 2
        assert target.write(prompt, 1, [3, 4, 5, 6]) == 4
        assert source.read(prompt, 5, [0]) == source.read(prompt, 9, [0]) == source.read(prompt, 0, []) == 0
        given = target.running.generate(prompt, max_tokens=6)
        assert given.cached_tokens == 5 * target.block_size
        assert given.token_ids == source.running.generate(prompt, max_tokens=6).token_ids


def test_what_is_there_is_kept(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(4, more=1)
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1)
        source.read(prompt, 0, [0, 1, 2, 3])
        target.running.generate(prompt[: 2 * target.block_size], max_tokens=1)
        assert target.write(prompt, 1, [1, 2, 3]) == 3
        assert target.write(prompt, 0, [0, 1, 2, 3]) == 4
        given = target.running.generate(prompt, max_tokens=3)
        assert given.cached_tokens == 4 * target.block_size
        assert given.token_ids == source.running.generate(prompt, max_tokens=3).token_ids
        stored = [block.hash for event in target.running.sink.events if isinstance(event, KVStored)
                  for block in event.blocks]  # fmt: skip
        assert sorted(stored) == sorted(block_hashes(prompt, target.block_size)), "each block is told of once"


def test_a_block_without_those_before_it_is_not_stored(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(3)
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1)
        source.read(prompt, 1, [1, 2])
        assert target.write(prompt, 1, [1, 2]) == 0
        assert target.stored(prompt) == 0
        assert target.running.generate(prompt).cached_tokens == 0


def test_writing_evicts_and_stops_where_the_cache_is_full(kv_engine_under_test: KVEngineCase) -> None:
    sizes = {"num_blocks": 12, "max_seq_len": 10 * kv_engine_under_test.engine.config.block_size}
    prompt, old = kv_engine_under_test.prompt(20), kv_engine_under_test.prompt(4, number=1)
    with kv_engine_under_test.pair(**sizes) as (source, target):
        source.running.generate(prompt, max_tokens=1)
        assert source.read(prompt, 0, range(20)) == 20
        target.running.generate(old, max_tokens=1)
        assert target.write(prompt, 0, range(20)) == 12
        assert (target.stored(prompt), target.stored(old)) == (12, 0)
        assert target.running.engine.stats().free_blocks == 12
        short = prompt[: 9 * target.block_size + 3]
        given = target.running.generate(short, max_tokens=4)
        assert given.cached_tokens == 9 * target.block_size
        assert given.token_ids == source.running.generate(short, max_tokens=4).token_ids
        stored = stored_after(target.running.sink.events, 12)
        assert stored.isdisjoint(block_hashes(old, target.block_size))
        assert stored >= set(block_hashes(short, target.block_size))


def test_other_salts_see_nothing(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(3)
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1, cache_salt="one")
        assert source.read(prompt, 0, [0, 1, 2]) == source.read(prompt, 0, [0, 1, 2], "two") == 0
        assert source.read(prompt, 0, [0, 1, 2], "one") == 3
        assert target.write(prompt, 0, [0, 1, 2], "one") == 3
        assert target.stored(prompt) == target.stored(prompt, "two") == 0
        assert target.running.generate(prompt, cache_salt="two").cached_tokens == 0
        assert target.running.generate(prompt, cache_salt="one").cached_tokens == 3 * target.block_size


def test_nothing_is_read_or_written_when_caching_is_off(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(2)
    with kv_engine_under_test.pair(enable_prefix_caching=False) as (source, target):
        source.running.generate(prompt, max_tokens=1)
        source.read(prompt, 0, [0, 1])
        assert target.write(prompt, 0, [0, 1]) == 0
        assert target.running.generate(prompt).cached_tokens == 0
        assert target.stored(prompt) == target.read(prompt, 0, [2, 3]) == 0


def test_events_tell_of_written_blocks_when_idle(kv_engine_under_test: KVEngineCase) -> None:
    prompt = kv_engine_under_test.prompt(3)
    with kv_engine_under_test.pair() as (source, target):
        source.running.generate(prompt, max_tokens=1)
        source.read(prompt, 0, [0, 1, 2])
        target.write(prompt, 0, [0, 1, 2])
        if not target.running.info.publishes_kv_events:
            return
        events = target.running.sink.wait_events(1, target.running.deadline_s)
        assert stored_after(events, target.running.info.num_blocks) == set(block_hashes(prompt, target.block_size))
        assert all(not step.outputs and step.stats is None for step in target.running.sink.steps)
