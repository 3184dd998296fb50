"""Simulated speculative decoding: the same tokens, more of them in a step."""

from array import array

import pytest

from trtserve.plugins.api import Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.speculation import Speculation
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenModel


def scheduler(speculation, max_num_tokens=64) -> Scheduler:
    limits = SchedulerLimits(4, 16, 4, max_num_tokens, 64)
    return Scheduler(limits, PassTiming(), TokenModel(100, 999), speculation)


def request(number: int, length=10, max_tokens=20) -> Request:
    prompt = array("i", range(number, number + length))
    return Request(RequestId(number), prompt, SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_runs_of_kept_drafts_are_geometric(rate):
    speculation = Speculation(num_draft_tokens=3, acceptance_rate=rate)
    kept = [speculation.draft(draw, limit=9)[1] for draw in range(1 << 16)]
    assert sum(kept) / len(kept) == pytest.approx(rate + rate**2 + rate**3, abs=1e-4)


def test_drafts_are_limited():
    certain = Speculation(num_draft_tokens=3, acceptance_rate=1.0)
    assert [certain.draft(0, limit) for limit in (0, 2, 3, 4)] == [(0, 0), (2, 2), (3, 3), (3, 3)]


def test_speculation_says_the_same_tokens_in_fewer_passes():
    def tokens_and_passes(speculation):
        engine = scheduler(speculation)
        engine.add(request(1, max_tokens=40))
        outputs = []
        while engine.has_work():
            outputs += engine.run_pass().outputs
        return [token_id for output in outputs for token_id in output.token_ids], len(outputs), engine.load()

    plain, _, _ = tokens_and_passes(None)
    certain, passes, load = tokens_and_passes(Speculation(3, 1.0))
    assert certain == plain
    assert passes == 1 + 10  # the prompt's pass, nine of four tokens, one of the three left
    assert (load.drafted_tokens_total, load.accepted_tokens_total) == (29, 29)
    never, passes, load = tokens_and_passes(Speculation(3, 0.0))
    assert never == plain
    assert passes == 40
    assert load.accepted_tokens_total == 0
    some, passes, load = tokens_and_passes(Speculation(3, 0.7))
    assert some == plain
    assert 10 < passes < 40
    assert load.generated_tokens_total == 40 == passes + load.accepted_tokens_total


def test_drafts_take_their_share_of_the_budget():
    engine = scheduler(Speculation(3, 1.0), max_num_tokens=6)
    engine.add(request(1, length=2))
    engine.add(request(2, length=2))
    engine.run_pass()
    assert [len(output.token_ids) for output in engine.run_pass().outputs] == [4, 2]
