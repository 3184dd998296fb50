"""Conformance of an engine: KV blocks, the prefix cache and its events. Run through
`trtserve.plugins.conformance.engine`."""

from __future__ import annotations

from trtserve.plugins.api import BlockHash, FinishReason, KVCleared, KVEvent, KVRemoved, KVStored
from trtserve.plugins.blocks import block_hash, block_hashes, root_hash
from trtserve.plugins.conformance.case import EngineCase, RunningEngine


def test_same_prompt_again_is_cached_and_says_the_same(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=True) as running:
        prompt = engine_under_test.prompt(_blocks(running, 3) + 1)
        first = running.generate(prompt, max_tokens=6)
        second = running.generate(prompt, max_tokens=6)
        assert first.cached_tokens == 0
        assert second.cached_tokens == _blocks(running, 3)
        assert second.token_ids == first.token_ids
        assert running.engine.stats().cached_tokens_total == second.cached_tokens


def test_some_token_is_always_computed(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=True) as running:
        prompt = engine_under_test.prompt(_blocks(running, 2))
        first = running.generate(prompt, max_tokens=3)
        second = running.generate(prompt, max_tokens=3)
        assert second.cached_tokens is not None
        assert 0 < second.cached_tokens < len(prompt)
        assert second.token_ids == first.token_ids


def test_nothing_is_cached_when_caching_is_off(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=False) as running:
        prompt = engine_under_test.prompt(_blocks(running, 3) + 1)
        running.generate(prompt)
        assert running.generate(prompt).cached_tokens == 0
        assert not any(isinstance(event, KVStored) for event in running.sink.events)


def test_salts_keep_caches_apart(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=True) as running:
        prompt = engine_under_test.prompt(_blocks(running, 3) + 1)
        running.generate(prompt, cache_salt="one")
        assert running.generate(prompt, cache_salt="two").cached_tokens == 0
        assert running.generate(prompt, cache_salt="one").cached_tokens == _blocks(running, 3)


def test_free_blocks_come_back(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        before = running.engine.stats().free_blocks
        prompts = [engine_under_test.prompt(5 + 7 * number, number) for number in range(6)]
        running.wait(*[running.submit(prompt, max_tokens=9) for prompt in prompts])
        assert running.engine.stats().free_blocks == before
        assert all(0 <= step.load.free_blocks <= running.info.num_blocks for step in running.sink.steps)


def test_requests_beyond_the_cache_all_end(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(num_blocks=12, max_seq_len=10 * engine_under_test.config.block_size) as running:
        before = running.engine.stats().free_blocks
        # Five times this is 30 blocks: they cannot all run at once, and those that do grow out of the cache.
        prompts = [engine_under_test.prompt(_blocks(running, 3), number) for number in range(5)]
        request_ids = [running.submit(prompt, max_tokens=_blocks(running, 3)) for prompt in prompts]
        running.wait(*request_ids)
        for request_id in request_ids:
            ended = running.ended(request_id)
            assert ended.finish_reason is FinishReason.LENGTH
            assert len(ended.token_ids) == _blocks(running, 3)
        assert running.engine.stats().free_blocks == before


def test_events_tell_what_is_stored(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=True) as running:
        if not running.info.publishes_kv_events:
            return
        prompt = engine_under_test.prompt(_blocks(running, 3) + 1)
        running.generate(prompt, max_tokens=2)
        stored = stored_after(running.sink.events, running.info.num_blocks)
        assert stored >= set(block_hashes(prompt, running.info.block_size))
        longer = prompt + engine_under_test.prompt(_blocks(running, 2), 3)
        running.generate(longer, max_tokens=2)
        stored = stored_after(running.sink.events, running.info.num_blocks)
        assert stored >= set(block_hashes(longer, running.info.block_size))


def test_events_follow_eviction(engine_under_test: EngineCase) -> None:
    sizes = {"num_blocks": 12, "max_seq_len": 10 * engine_under_test.config.block_size}
    with engine_under_test.running(enable_prefix_caching=True, **sizes) as running:
        if not running.info.publishes_kv_events:
            return
        for number in range(8):
            running.generate(engine_under_test.prompt(_blocks(running, 4) + 1, number), max_tokens=3)
            stored = stored_after(running.sink.events, running.info.num_blocks)
        assert any(isinstance(event, KVRemoved | KVCleared) for event in running.sink.events)
        last = engine_under_test.prompt(_blocks(running, 4) + 1, 7)
        assert stored >= set(block_hashes(last, running.info.block_size))
        gone = engine_under_test.prompt(_blocks(running, 4) + 1, 0)
        held = sum(block_hash in stored for block_hash in block_hashes(gone, running.info.block_size))
        assert running.generate(gone).cached_tokens == held * running.info.block_size


def stored_after(events: list[KVEvent], num_blocks: int) -> set[BlockHash]:
    """The blocks that are stored after these events, all without a salt; checks each event on the way."""
    stored: set[BlockHash] = set()
    ever_stored: set[BlockHash] = set()
    for event in events:
        match event:
            case KVStored(parent, blocks):
                # It may be evicted again: the sequence can hold a second copy of it, computed at the same time.
                assert parent is None or parent in ever_stored, "the parent of a stored block was never stored"
                previous = root_hash() if parent is None else parent
                for block in blocks:
                    assert block.hash == block_hash(previous, block.token_ids), "hash, parent and tokens disagree"
                    previous = block.hash
                    stored.add(block.hash)
                    ever_stored.add(block.hash)
            case KVRemoved(hashes):
                assert stored.issuperset(hashes), "a block was removed that was not stored"
                stored.difference_update(hashes)
            case KVCleared():
                stored.clear()
        assert len(stored) <= num_blocks, "more blocks are stored than there are"
    return stored


def _blocks(running: RunningEngine, count: int) -> int:
    """The tokens of so many blocks."""
    return count * running.info.block_size
