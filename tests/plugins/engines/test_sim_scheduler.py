"""The scheduler against its rules: small scenarios whose times and cache hits are computed here by formula."""

from array import array

import pytest

from trtserve.plugins.api import FinishReason, KVRemoved, KVStored, Request, RequestId, RequestRefused, SamplingParams
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenModel

BLOCK = 4


def scheduler(num_blocks=16, max_num_seqs=4, max_num_tokens=64, caching=True) -> Scheduler:
    limits = SchedulerLimits(BLOCK, num_blocks, max_num_seqs, max_num_tokens, num_blocks * BLOCK, caching)
    return Scheduler(limits, PassTiming(), TokenModel(100, 999))


def request(number: int, prompt, max_tokens=4, **sampling) -> Request:
    ids = array("i", prompt if not isinstance(prompt, int) else [number * 1000 + place for place in range(prompt)])
    return Request(RequestId(number), ids, SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling))


def prefill_ms(tokens: int) -> float:
    return 4.209989e-7 * tokens**2 + 1.518344e-2 * tokens + 16.50142


def decode_ms(context: int, num_blocks: int) -> float:
    usage = context / (num_blocks * BLOCK)
    return -25.74 * usage**2 + 54.01 * usage + 5.74


def all_steps(engine: Scheduler):
    """What each pass gives until there is no work."""
    steps = []
    while engine.has_work():
        steps.append(engine.run_pass())
        assert len(steps) < 10_000
    return steps


def tokens_of(outputs):
    return [token_id for output in outputs for token_id in output.token_ids]


def run(engine: Scheduler):
    """All passes until there is no work: [(duration in ms, {request: number of tokens})]."""
    return [
        (step.stats.duration_s * 1000, {output.request_id: len(output.token_ids) for output in step.outputs})
        for step in all_steps(engine)
    ]


def durations(passes):
    return [duration for duration, _ in passes]


def test_one_request_is_a_prefill_and_then_decodes():
    engine = scheduler()
    engine.add(request(1, 10, max_tokens=3))
    passes = run(engine)
    # The pass that ends the prompt gives the first token and costs no decode.
    assert durations(passes) == pytest.approx([prefill_ms(10), decode_ms(11, 16), decode_ms(12, 16)])
    assert [given for _, given in passes] == [{1: 1}] * 3


def test_a_long_prompt_is_chunked_by_the_budget():
    engine = scheduler(max_num_tokens=12)
    engine.add(request(1, 30, max_tokens=1))
    passes = run(engine)
    assert durations(passes) == pytest.approx([prefill_ms(12), prefill_ms(12), prefill_ms(6)])
    assert [given for _, given in passes] == [{}, {}, {1: 1}]


def test_running_sequences_come_before_waiting_ones_in_a_mixed_pass():
    engine = scheduler(max_num_tokens=12)
    engine.add(request(1, 8, max_tokens=3))
    engine.run_pass()
    engine.add(request(2, 20, max_tokens=1))
    passes = run(engine)
    # One of twelve goes to the decode, eleven to the prompt; then nine are left of it.
    assert durations(passes) == pytest.approx([prefill_ms(11) + decode_ms(9, 16), prefill_ms(9) + decode_ms(10, 16)])
    assert [given for _, given in passes] == [{1: 1}, {1: 1, 2: 1}]


def test_two_prompts_are_timed_by_their_rounded_mean():
    engine = scheduler()
    engine.add(request(1, 9, max_tokens=1))
    engine.add(request(2, 4, max_tokens=1))
    assert durations(run(engine)) == pytest.approx([prefill_ms(2 * ((9 + 4) // 2))])


def test_first_in_first_out_and_no_overtaking():
    engine = scheduler(num_blocks=8)
    engine.add(request(1, 20, max_tokens=2))  # 5 blocks of 8
    engine.add(request(2, 16, max_tokens=1))  # 4: must wait until 1 has ended
    engine.add(request(3, 4, max_tokens=1))  # 1: would fit, but 2 is before it
    assert [given for _, given in run(engine)] == [{1: 1}, {1: 1}, {2: 1, 3: 1}]


def test_no_more_than_max_num_seqs_run():
    engine = scheduler(max_num_seqs=2)
    for number in range(5):
        engine.add(request(number, 3, max_tokens=1))
    assert [set(given) for _, given in run(engine)] == [{0, 1}, {2, 3}, {4}]


def test_a_sibling_in_the_same_pass_already_hits():
    engine = scheduler()
    prompt = range(10)
    engine.add(request(1, prompt, max_tokens=1))
    engine.add(request(2, prompt, max_tokens=1))
    step = engine.run_pass()
    assert [output.cached_tokens for output in step.outputs] == [0, 8]
    # Ends 10 and 10, begins 0 and 8: the means are 10 and 4.
    assert step.stats.duration_s * 1000 == pytest.approx(prefill_ms(2 * (10 - 4)))
    assert step.stats.prefill_tokens == 12


@pytest.mark.parametrize(("length", "cached"), [(11, 8), (12, 8), (13, 12)])
def test_reuse_leaves_a_token_to_compute(length, cached):
    engine = scheduler()
    for number in (1, 2):
        engine.add(request(number, range(length), max_tokens=1))
        (output,) = engine.run_pass().outputs
    assert output.cached_tokens == cached
    assert engine.load().cached_tokens_total == cached
    assert engine.load().prompt_tokens_total == 2 * length


def test_decode_out_of_blocks_preempts_the_latest_which_goes_first_again():
    engine = scheduler(num_blocks=6)
    engine.add(request(1, 8, max_tokens=9))  # grows to 16 computed tokens: 4 blocks
    engine.add(request(2, 8, max_tokens=9))
    passes = [engine.run_pass() for _ in range(5)]  # prompt, then 4 tokens each: 3 blocks each, all full
    engine.add(request(3, 4, max_tokens=1))
    step = engine.run_pass()
    assert engine.load().preemptions_total == 1
    assert [output.request_id for output in step.outputs] == [1]
    assert [sequence.request.id for sequence in engine.waiting] == [2, 3]
    assert step.load.running == 1
    # It computes its prompt and its output again but for the prompt's blocks that are still stored; no token is lost.
    steps = [*passes, step, *all_steps(engine)]
    outputs = [output for step in steps for output in step.outputs if output.request_id == 2]
    alone = scheduler()
    alone.add(request(2, 8, max_tokens=9))
    expected = [output for step in all_steps(alone) for output in step.outputs]
    assert tokens_of(outputs) == tokens_of(expected)
    assert [output.cached_tokens for output in outputs if output.cached_tokens is not None] == [0]


def test_the_suffix_is_evicted_first_and_events_tell():
    engine = scheduler(num_blocks=4)
    first = request(1, 12, max_tokens=1)
    engine.add(first)
    (stored,) = engine.run_pass().events
    hashes = block_hashes(first.prompt, BLOCK)
    assert isinstance(stored, KVStored)
    assert (stored.parent, tuple(block.hash for block in stored.blocks)) == (None, hashes)
    engine.add(request(2, 8, max_tokens=1))  # 2 blocks: the unused one, and 1's last
    removed, stored = engine.run_pass().events
    assert removed == KVRemoved((hashes[2],))
    assert len(stored.blocks) == 2
    assert engine.load().free_blocks == 4


def test_blocks_of_the_output_continue_the_prompts_chain():
    engine = scheduler()
    engine.add(request(1, 6, max_tokens=8))
    steps = all_steps(engine)
    events = [event for step in steps for event in step.events]
    tokens = array("i", [1000 + place for place in range(6)])
    tokens.extend(tokens_of(output for step in steps for output in step.outputs))
    hashes = block_hashes(tokens, BLOCK)[:3]  # 14 tokens, the last one is never computed
    assert [block.hash for event in events for block in event.blocks] == list(hashes)
    assert [event.parent for event in events] == [None, hashes[0], hashes[1]]
    # The next turn of the conversation finds them.
    engine.add(request(2, [*tokens, 5], max_tokens=1))
    assert engine.run_pass().outputs[0].cached_tokens == 12


def test_without_caching_nothing_is_kept():
    engine = scheduler(caching=False)
    for number in (1, 2):
        engine.add(request(number, range(12), max_tokens=6))
        outputs = [output for _ in range(6) for output in engine.run_pass().outputs]
        assert outputs[0].cached_tokens == 0
    assert engine.pool.num_unused == 16
    assert not engine.run_pass().events


def test_server_hashes_are_taken_where_they_fit():
    engine = scheduler()
    hashes = (11, 12)
    engine.add(Request(RequestId(1), array("i", range(9)), SamplingParams(max_tokens=1), block_hashes=hashes))
    (stored,) = engine.run_pass().events
    assert tuple(block.hash for block in stored.blocks) == hashes


def test_abort_wherever_the_request_is():
    engine = scheduler(max_num_seqs=1)
    engine.add(request(1, 12, max_tokens=9))
    engine.add(request(2, 12, max_tokens=9))
    engine.run_pass()
    for number in (1, 2, 2, 77):
        engine.abort(RequestId(number))
    step = engine.run_pass()
    assert [(output.request_id, output.finish_reason) for output in step.outputs] == [
        (1, FinishReason.CANCELLED),
        (2, FinishReason.CANCELLED),
    ]
    assert step.stats is None
    assert not engine.has_work()
    assert step.load.free_blocks == 16


def test_a_prompt_that_leaves_no_room_is_refused():
    engine = scheduler(num_blocks=4)
    with pytest.raises(RequestRefused, match="has 16 tokens; this engine takes 1 to 15"):
        engine.add(request(1, 16))
    with pytest.raises(RequestRefused, match="has 0 tokens"):
        engine.add(request(2, []))
    assert not engine.has_work()
    engine.add(request(3, 15, max_tokens=100))  # ends with the longest sequence
    assert [given for _, given in run(engine)] == [{3: 1}]
