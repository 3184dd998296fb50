"""The conformance suite notices what it is there for: engines that are wrong in one way each."""

from array import array

import pytest
from msgspec.structs import replace

from trtserve.plugins.api import EngineConfig, FinishReason, KVStored, Output, RequestId, StepOutputs, WorkerLoad
from trtserve.plugins.conformance import engine as suite
from trtserve.plugins.conformance.engine import CollectingSink, EngineCase
from trtserve.plugins.engines.sim import make_engine


class WrongEngine:
    """A simulated engine whose steps pass through `distort`, and which may be deaf to cancels."""

    def __init__(self, config, distort=lambda step: step, is_deaf=False):
        self._engine = make_engine("sim", config)
        self._distort, self._is_deaf = distort, is_deaf
        self.submit, self.stats, self.close = self._engine.submit, self._engine.stats, self._engine.close

    def start(self, sink):
        self._sink = sink
        self.fail, self.progress = sink.fail, sink.progress
        return self._engine.start(self)

    def push(self, step):
        self._sink.push(self._distort(step))

    def cancel(self, request_id):
        if not self._is_deaf:
            self._engine.cancel(request_id)


def outputs(change):
    return lambda step: replace(step, outputs=[change(output) for output in step.outputs])


def without(field):
    return lambda output: replace(output, **{field: None})


def ends_twice(step):
    return replace(step, outputs=[*step.outputs, *(output for output in step.outputs if output.finish_reason)])


def leaves_out_the_stop_token(output):
    kept = [token_id for token_id in output.token_ids if token_id != output.stop_token_id]
    return replace(output, token_ids=kept)


def adds_a_token(output):
    return replace(output, token_ids=[*output.token_ids, 500]) if output.finish_reason else output


def forgets_parents(step):
    return replace(step, events=[replace(e, parent=None) if isinstance(e, KVStored) else e for e in step.events])


def forgets_removals(step):
    return replace(step, events=[event for event in step.events if isinstance(event, KVStored)])


def resets_counters(step):
    return replace(step, load=replace(step.load, generated_tokens_total=0))


def invents_statistics(step):
    return replace(step, stats=step.stats and replace(step.stats, prefill_tokens=1))


WRONG = [
    (suite.test_cancel_gives_one_final_output_and_frees, {"distort": ends_twice}),
    (suite.test_many_ragged_requests_end_exactly_once, {"distort": ends_twice}),
    (suite.test_max_tokens_is_exact, {"distort": outputs(adds_a_token)}),
    (suite.test_stop_token_ends_and_is_reported, {"distort": outputs(leaves_out_the_stop_token)}),
    (suite.test_stop_token_ends_and_is_reported, {"distort": outputs(without("stop_token_id"))}),
    (suite.test_same_prompt_again_is_cached_and_says_the_same, {"distort": outputs(without("cached_tokens"))}),
    (suite.test_logprobs_have_the_shape_asked_for, {"distort": outputs(without("logprobs"))}),
    (suite.test_refused_request_ends_with_an_error_and_the_engine_goes_on, {"distort": outputs(without("error"))}),
    (suite.test_events_tell_what_is_stored, {"distort": forgets_parents}),
    (suite.test_events_tell_what_is_stored, {"distort": lambda step: replace(step, events=())}),
    (suite.test_events_follow_eviction, {"distort": forgets_removals}),
    (suite.test_counters_grow_and_add_up, {"distort": resets_counters}),
    (suite.test_pass_statistics_are_true, {"distort": invents_statistics}),
    (suite.test_cancel_of_a_waiting_request, {"is_deaf": True}),
]


@pytest.mark.parametrize(("test", "wrong"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_engine_is_noticed(test, wrong):
    options = {"speedup": 1e9, "vocab_size": 1000}
    if "is_deaf" in wrong:  # a request that nobody cancels must outlast the suite's patience
        options["speedup"] = 1.0
    config = EngineConfig("", block_size=8, num_blocks=400, max_num_seqs=6, max_num_tokens=64, options=options)
    case = EngineCase(lambda c: WrongEngine(c, **wrong), config, 1000, eos_token_ids=(2,), deadline_s=0.5)
    with pytest.raises(AssertionError):
        test(case)


def test_the_sink_keeps_order_and_waits():
    sink = CollectingSink()
    first, last = Output(RequestId(1), [5]), Output(RequestId(1), [6], FinishReason.LENGTH)
    sink.progress("loading")
    sink.push(StepOutputs([first], WorkerLoad()))
    sink.wait_first_output(RequestId(1), 1)
    with pytest.raises(AssertionError, match=r"waited 0\.01 s for the end of requests \[1\]"):
        sink.wait_ended([RequestId(1)], 0.01)
    sink.push(StepOutputs([last], WorkerLoad()))
    sink.wait_ended([RequestId(1)], 1)
    assert sink.outputs_of(RequestId(1)) == [first, last]
    assert len(sink.steps) == 2
    assert sink.phases == ["loading"]
    assert sink.stays_silent(0.01)
    sink.fail(OSError("lost"))
    assert str(sink.wait_failure(1)) == "lost"
    with pytest.raises(AssertionError, match="the engine failed: OSError"):
        sink.wait_ended([RequestId(2)], 1)


def test_prompts_differ_from_their_first_token_on():
    case = EngineCase(lambda config: None, EngineConfig(""), vocab_size=50, eos_token_ids=(0, 7))
    prompts = [case.prompt(5, number) for number in range(10)]
    assert len({prompt[0] for prompt in prompts}) == 10
    assert all(isinstance(prompt, array) and not {0, 7} & set(prompt) for prompt in prompts)
