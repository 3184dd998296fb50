"""Conformance of an engine: how requests and the engine itself end. Run through
`trtserve.plugins.conformance.engine`."""

from __future__ import annotations

from array import array
from itertools import pairwise

from trtserve.plugins.api import FinishReason, RequestId
from trtserve.plugins.conformance.case import EngineCase, RunningEngine

# How long a test listens for something that must not come.
SILENCE_S = 0.2


def test_many_ragged_requests_end_exactly_once(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        sizes = {}
        for number in range(2 * running.info.max_num_seqs + 3):
            max_tokens = 1 + number * 5 % 11
            prompt = engine_under_test.prompt(1 + number * 13 % 40, number)
            sizes[running.submit(prompt, max_tokens=max_tokens)] = max_tokens
        running.wait(*sizes)
        for request_id, max_tokens in sizes.items():
            ended = running.ended(request_id)
            assert ended.finish_reason is FinishReason.LENGTH
            assert len(ended.token_ids) == max_tokens


def test_cancel_gives_one_final_output_and_frees(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        free_blocks = running.engine.stats().free_blocks
        request_id = _submit_long(running, engine_under_test)
        running.sink.wait_first_output(request_id, running.deadline_s)
        running.engine.cancel(request_id)
        running.engine.cancel(request_id)
        ended = running.ended(request_id)
        assert ended.finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
        running.engine.cancel(request_id)
        _check_goes_on(running, engine_under_test)
        running.ended(request_id)  # still ends once, whatever came since
        assert running.engine.stats().free_blocks == free_blocks


def test_cancel_right_after_submit(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        free_blocks = running.engine.stats().free_blocks
        request_ids = [_submit_long(running, engine_under_test, number) for number in range(8)]
        for request_id in request_ids:
            running.engine.cancel(request_id)
        running.wait(*request_ids)
        _check_goes_on(running, engine_under_test)
        for request_id in request_ids:
            assert running.ended(request_id).finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
        assert running.engine.stats().free_blocks == free_blocks


def test_cancel_of_a_waiting_request(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(max_num_seqs=1) as running:
        first = _submit_long(running, engine_under_test)
        waiting = _submit_long(running, engine_under_test, 1)
        running.engine.cancel(waiting)
        running.ended(waiting)
        running.engine.cancel(first)
        running.ended(first)
        _check_goes_on(running, engine_under_test)


def test_cancel_of_unknown_or_ended_requests_is_ignored(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        unknown = RequestId(10**9)
        running.engine.cancel(unknown)
        request_id = running.submit(engine_under_test.prompt(5))
        running.wait(request_id)
        running.engine.cancel(request_id)
        _check_goes_on(running, engine_under_test)
        running.ended(request_id)
        assert not running.sink.outputs_of(unknown)


def test_refused_request_ends_with_an_error_and_the_engine_goes_on(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        length = running.info.max_seq_len + 1
        token_id = engine_under_test.prompt(1)[0]
        ended = running.generate(array("i", [token_id]) * length, max_tokens=1)
        assert ended.finish_reason is FinishReason.ERROR
        assert ended.error, "a refusal says why"
        assert not ended.token_ids
        _check_goes_on(running, engine_under_test)


def test_counters_grow_and_add_up(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        for number in range(3):
            running.generate(engine_under_test.prompt(20, number), max_tokens=7)
        loads = [step.load for step in running.sink.steps]
        for before, after in pairwise(loads):
            assert before.prompt_tokens_total <= after.prompt_tokens_total
            assert before.cached_tokens_total <= after.cached_tokens_total
            assert before.generated_tokens_total <= after.generated_tokens_total
            assert before.preemptions_total <= after.preemptions_total
        assert (loads[-1].running, loads[-1].waiting) == (0, 0)
        assert loads[-1].prompt_tokens_total == 60
        assert loads[-1].generated_tokens_total == 21


def test_pass_statistics_are_true(engine_under_test: EngineCase) -> None:
    with engine_under_test.running(enable_prefix_caching=False) as running:
        running.generate(engine_under_test.prompt(20), max_tokens=7)
        passes = [step.stats for step in running.sink.steps if step.stats is not None]
        if passes:  # an engine whose passes cannot be told apart gives none
            assert sum(stats.prefill_tokens for stats in passes) == 20
            assert all(stats.duration_s >= 0 for stats in passes)
            assert all(stats.context_tokens >= stats.decode_sequences >= 0 for stats in passes)


def test_close_ends_everything_and_is_idempotent(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        request_id = _submit_long(running, engine_under_test)
        running.sink.wait_first_output(request_id, running.deadline_s)
        running.engine.close()
        said = len(running.sink.outputs_of(request_id))
        running.engine.cancel(request_id)
        running.engine.close()
        assert running.sink.stays_silent(SILENCE_S)
        assert len(running.sink.outputs_of(request_id)) == said


def test_close_of_an_idle_engine(engine_under_test: EngineCase) -> None:
    with engine_under_test.running() as running:
        running.engine.close()
        assert not running.sink.steps


def _submit_long(running: RunningEngine, case: EngineCase, number: int = 0) -> RequestId:
    """A request as long as the engine takes, so that it is likely to be running still when it is cancelled."""
    length = min(20, running.info.max_seq_len // 2)
    return running.submit(case.prompt(length, number), max_tokens=running.info.max_seq_len - length)


def _check_goes_on(running: RunningEngine, case: EngineCase) -> None:
    """Whatever was sent before, a request after it is served; its end also shows that all before was handled."""
    assert len(running.generate(case.prompt(6, 99), max_tokens=4).token_ids) == 4
