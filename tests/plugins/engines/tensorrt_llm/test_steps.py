"""What happens in one turn of the loop is one step a rank, with one output a request."""

from __future__ import annotations

import asyncio

import pytest

from trtserve.plugins.api import FinishReason, KVCleared, Output, PassStats, TokenLogprob
from trtserve.plugins.conformance.sink import CollectingSink
from trtserve.plugins.engines.tensorrt_llm.stats import LoadBook
from trtserve.plugins.engines.tensorrt_llm.steps import StepReport


@pytest.fixture
def sink():
    return CollectingSink()


@pytest.fixture
def report(sink):
    return StepReport(sink, [LoadBook(4, 0), LoadBook(4, 0)])


async def turn():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_one_step_a_turn_and_rank(report, sink):
    report.open()
    await turn()
    assert sink.steps == []
    report.output(Output(1, [5]), 0)
    report.output(Output(2, [6]), 0)
    report.output(Output(3, [7]), 1)
    report.events([KVCleared()], 1)
    report.passed(PassStats(0.1, 4, 0, 0))
    await turn()
    first, second = sink.steps
    assert [output.request_id for output in first.outputs] == [1, 2] and first.rank == 0 and first.stats is not None
    assert [output.request_id for output in second.outputs] == [3] and second.rank == 1
    assert second.events == [KVCleared()] and second.stats is None
    await turn()
    assert len(sink.steps) == 2


async def test_every_pass_is_told(report, sink):
    report.open()
    passes = [PassStats(0.1, number, 0, 0) for number in range(1, 4)]
    for stats in passes:
        report.passed(stats)
    await turn()
    assert [step.stats for step in sink.steps] == passes


async def test_two_outputs_of_a_request_become_one(report, sink):
    report.open()
    first = Output(1, [5], cached_tokens=8, logprobs=(TokenLogprob(5, -1.0),))
    last = Output(1, [6, 7], FinishReason.STOP, 7, logprobs=(TokenLogprob(6, -1.0), TokenLogprob(7, -1.0)),
                  speculation=(4, 1))  # fmt: skip
    report.output(first, 0)
    report.output(last, 0)
    await turn()
    (step,) = sink.steps
    (output,) = step.outputs
    assert (output.token_ids, output.finish_reason, output.stop_token_id) == ([5, 6, 7], FinishReason.STOP, 7)
    assert (output.cached_tokens, len(output.logprobs), output.speculation) == (8, 3, (4, 1))


async def test_an_error_after_tokens_keeps_what_it_says(report, sink):
    report.open()
    report.output(Output(1, [5], cached_tokens=0), 0)
    report.output(Output(1, finish_reason=FinishReason.ERROR, error="no", is_refused=True), 0)
    await turn()
    (output,) = sink.steps[0].outputs
    assert (output.token_ids, output.error, output.is_refused, output.logprobs) == ([5], "no", True, None)


async def test_of_the_warm_up_only_events_are_told(report, sink):
    report.output(Output(1, [5]), 0)
    report.passed(PassStats(0.1, 4, 0, 0))
    report.events([KVCleared()], 0)
    await turn()
    assert sink.steps == []
    report.open()
    await turn()
    (step,) = sink.steps
    assert (step.outputs, step.events, step.stats) == ([], [KVCleared()], None)
