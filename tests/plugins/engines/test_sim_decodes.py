"""Decodes run at once against the same passes run one by one."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import FinishReason, Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.plugins.engines.sim.scheduler import Scheduler
from trtserve.plugins.engines.sim.speculation import Speculation
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenModel

EOS = 7
NO_LIMIT = 1 << 30

samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 40),
    min_tokens=st.integers(0, 6),
    temperature=st.just(0.0),
    stop_token_ids=st.sampled_from([(), (), (101,)]),
    ignore_eos=st.sampled_from([True, True, False]),
    logprobs=st.sampled_from([None, None, 1]),
)
arrivals = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(0, 2), samplings), min_size=1, max_size=8
)


def scheduler(block_size=16, num_blocks=32, budget=32, eos_probability=0.0, **others) -> Scheduler:
    limits = SchedulerLimits(block_size, num_blocks, 4, budget, num_blocks * block_size)
    return Scheduler(limits, PassTiming(), TokenModel(100, 131, eos_probability=eos_probability), **others)


def request(number, prompt, sampling, eos=(EOS,)):
    return Request(RequestId(number), array("i", prompt), sampling, eos)


def plain(number, length, max_tokens):
    return request(number, range(number, number + length), SamplingParams(max_tokens, ignore_eos=True), ())


class Passes:
    """All that a scheduler has said so far."""

    def __init__(self, engine: Scheduler) -> None:
        self.engine = engine
        self.durations_s: list[float] = []
        self.events = []
        self.tokens: dict[int, list[int]] = {}
        self.ends = []
        self.last = None

    def __len__(self) -> int:
        return len(self.durations_s)

    def run(self, most: int = 0) -> None:
        """One pass; up to `most` at once where they are only decodes."""
        planned_s = self.engine.plan_decodes(most) if most else []
        step = self.engine.run_decodes(len(planned_s)) if planned_s else self.engine.run_pass()
        self.durations_s += planned_s or [step.stats.duration_s if step.stats else 0.0]
        self.last = step.load, step.stats
        self.events += step.events
        for output in step.outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            told = output.finish_reason, output.stop_token_id, output.cached_tokens, output.logprobs
            if any(part is not None for part in told):
                self.ends.append((len(self), output.request_id, told))

    @property
    def pool(self):
        pool = self.engine.pool
        evictable = [block.hash for block in pool._evictable]
        return pool.num_unused, evictable, {found: block.references for found, block in pool._stored.items()}

    @property
    def sequences(self):
        return [(s.request.id, s.num_computed, s.num_tokens, s.generated, s.hashes) for s in self.engine.running]


@settings(max_examples=150, deadline=None)
@given(
    arrivals,
    st.integers(1, 9),
    st.integers(16, 40),
    st.sampled_from([3, 8, 64]),
    st.sampled_from([0.0, 0.1]),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_decodes_at_once_are_the_same_passes(arrivals, block_size, num_blocks, budget, eos_probability, at_once):
    one_by_one, together = (Passes(scheduler(block_size, num_blocks, budget, eos_probability)) for _ in range(2))
    longest = one_by_one.engine.limits.max_seq_len
    due = sorted(
        (at, number, length, tenant, sampling) for number, (at, length, tenant, sampling) in enumerate(arrivals)
    )
    turn = 0
    while due or together.engine.has_work():
        while due and (due[0][0] <= len(together) or not together.engine.has_work()):
            _, number, length, tenant, sampling = due.pop(0)
            new = request(number, [tenant] * min(length, longest - 1), sampling)
            one_by_one.engine.add(new)
            together.engine.add(new)
        most = at_once[turn % len(at_once)]
        if due:
            most = min(most, max(1, due[0][0] - len(together)))
        turn += 1
        together.run(most)
        while len(one_by_one) < len(together):
            one_by_one.run()
        assert one_by_one.durations_s == together.durations_s
        assert one_by_one.last == together.last
        assert one_by_one.tokens == together.tokens
        assert one_by_one.ends == together.ends
        assert one_by_one.events == together.events
        assert one_by_one.pool == together.pool
        assert one_by_one.sequences == together.sequences
    assert not one_by_one.engine.has_work()


def test_a_plan_ends_before_the_next_block_and_with_the_first_request():
    engine = scheduler()
    engine.add(plain(1, 18, 40))
    assert engine.plan_decodes(NO_LIMIT) == []  # it waits
    engine.run_pass()
    # 18 tokens and the first one: the 32nd token completes a block.
    assert len(engine.plan_decodes(NO_LIMIT)) == 32 - 19
    assert len(engine.plan_decodes(5)) == 5
    engine.add(plain(2, 3, 6))
    assert engine.plan_decodes(NO_LIMIT) == []
    engine.run_pass()
    plan_s = engine.plan_decodes(NO_LIMIT)
    assert len(plan_s) == 5
    step = engine.run_decodes(5)
    assert [(output.request_id, len(output.token_ids), output.finish_reason) for output in step.outputs] == [
        (1, 5, None),
        (2, 5, FinishReason.LENGTH),
    ]
    assert step.stats.duration_s == plan_s[-1]
    assert step.load.running == 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(40, stop_token_ids=(101,), ignore_eos=True),
        SamplingParams(40, ignore_eos=False),
        SamplingParams(40, ignore_eos=True, logprobs=0),
        SamplingParams(40, ignore_eos=True, min_tokens=10),
    ],
    ids=["stop token", "end of sequence", "log probabilities", "least length"],
)
def test_what_the_next_token_can_change_is_not_planned(sampling):
    engine = scheduler()
    engine.add(request(1, range(18), sampling))
    engine.run_pass()
    assert engine.plan_decodes(NO_LIMIT) == []


def test_speculation_and_early_ends_are_not_planned():
    drafting = scheduler(speculation=Speculation(2, 0.5))
    ending = scheduler()
    for engine in (drafting, ending):
        engine.add(plain(1, 18, 40))
        engine.add(plain(2, 18, 40))
        engine.run_pass()
        if engine is ending:
            while not engine.plan_decodes(1):
                engine.run_pass()
            engine.abort(RequestId(2))
        assert engine.plan_decodes(NO_LIMIT) == []
        assert engine.has_work()
