"""Conformance of an engine: what it generates. Run through `trtserve.plugins.conformance.engine`."""

from __future__ import annotations

import math

from trtserve.plugins.api import FinishReason
from trtserve.plugins.conformance.case import EngineCase


def test_start_tells_sane_sizes(engine_under_test: EngineCase) -> None:
    config = engine_under_test.config
    with engine_under_test.running() as running:
        info = running.info
        assert info.block_size == config.block_size
        assert info.num_blocks >= 1
        assert 1 <= info.max_num_seqs <= config.max_num_seqs
        assert info.max_num_tokens >= 1
        assert 2 <= info.max_seq_len <= info.num_blocks * info.block_size
        assert info.vocab_size == engine_under_test.vocab_size
        load = running.engine.stats()
        assert (load.running, load.waiting, load.generated_tokens_total) == (0, 0, 0)
        assert 0 < load.free_blocks <= info.num_blocks


def test_an_engine_says_whether_it_caches_prefixes(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        prompt = engine_under_test.prompt(3 * running.info.block_size + 1)
        running.generate(prompt)
        again = running.generate(prompt)
        assert running.info.caches_prefixes == bool(again.cached_tokens)


def test_max_tokens_is_exact(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        for max_tokens in (1, 2, 13):
            ended = running.generate(engine_under_test.prompt(9), max_tokens=max_tokens)
            assert len(ended.token_ids) == max_tokens
            assert ended.finish_reason is FinishReason.LENGTH
            assert ended.stop_token_id is None
            assert all(0 <= token_id < running.info.vocab_size for token_id in ended.token_ids)


def test_prompts_of_any_length_are_served(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        block_size = running.info.block_size
        lengths = (1, block_size - 1, block_size, block_size + 1, running.info.max_num_tokens + 1)
        for number, length in enumerate(length for length in lengths if 0 < length < running.info.max_seq_len - 3):
            assert len(running.generate(engine_under_test.prompt(length, number), max_tokens=3).token_ids) == 3


def test_greedy_is_deterministic(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running(enable_prefix_caching=False) as running:
        first = running.generate(prompt, max_tokens=12)
        again = running.generate(prompt, max_tokens=12, seed=5)
    with engine_under_test.running(enable_prefix_caching=False) as running:
        elsewhere = running.generate(prompt, max_tokens=12)
    assert first.token_ids == again.token_ids == elsewhere.token_ids


def test_seeds_reproduce(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running(enable_prefix_caching=False) as running:
        for seed in (0, 7, -1, 2**63 - 1):
            first = running.generate(prompt, max_tokens=8, temperature=1.0, seed=seed)
            again = running.generate(prompt, max_tokens=8, temperature=1.0, seed=seed)
            assert first.token_ids == again.token_ids


def test_stop_token_ends_and_is_reported(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running() as running:
        free = running.generate(prompt, max_tokens=12).token_ids
        # The later the better: the first place of whichever token is first said last.
        place = max(free.index(token_id) for token_id in free)
        ended = running.generate(prompt, max_tokens=12, stop_token_ids=(free[place],))
        assert ended.finish_reason is FinishReason.STOP
        assert ended.stop_token_id == free[place]
        assert ended.token_ids == free[: place + 1], "the stop token belongs to token_ids"


def test_min_tokens_holds_stop_tokens_back(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running() as running:
        stops = tuple(set(running.generate(prompt, max_tokens=12).token_ids))
        ended = running.generate(prompt, max_tokens=12, min_tokens=6, stop_token_ids=stops)
        assert len(ended.token_ids) >= 6
        assert not set(ended.token_ids[:6]) & set(stops)
        if ended.finish_reason is FinishReason.STOP:
            assert ended.stop_token_id == ended.token_ids[-1]


def test_end_of_sequence_and_ignore_eos(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running() as running:
        ended = running.generate(prompt, max_tokens=12, ignore_eos=False)
        ends = set(engine_under_test.eos_token_ids)
        assert not set(ended.token_ids[:-1]) & ends
        if ended.finish_reason is FinishReason.STOP:
            assert ended.stop_token_id == ended.token_ids[-1]
            assert ended.stop_token_id in ends
        else:
            assert len(ended.token_ids) == 12
            assert ended.token_ids[-1] not in ends
        ignoring = running.generate(prompt, max_tokens=12, ignore_eos=True)
        assert len(ignoring.token_ids) == 12
        assert ignoring.finish_reason is FinishReason.LENGTH


def test_logprobs_have_the_shape_asked_for(engine_under_test: EngineCase) -> None:
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running() as running:
        if not running.info.supports_logprobs:
            return
        assert not running.generate(prompt, max_tokens=5).logprobs
        for num_top in (0, 1, min(5, running.info.max_logprobs)):
            ended = running.generate(prompt, max_tokens=5, logprobs=num_top)
            assert [logprob.token_id for logprob in ended.logprobs] == ended.token_ids
            for logprob in ended.logprobs:
                assert len(logprob.top) == num_top
                assert len({token_id for token_id, _ in logprob.top}) == num_top
                values = [value for _, value in logprob.top]
                assert values == sorted(values, reverse=True)
                assert math.fsum(math.exp(value) for value in values) <= 1 + 1e-3
                assert logprob.logprob <= 1e-6
                assert all(math.isclose(value, logprob.logprob) for token_id, value in logprob.top if
                           token_id == logprob.token_id)  # fmt: skip
