"""The pass-time model, and a pass lasting that long in real time."""

from array import array

import pytest

from trtserve.plugins.api import EngineConfig, Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim.engine import SimEngine
from trtserve.plugins.engines.sim.pacing import LONGEST_LATENESS_S, Pacer
from trtserve.plugins.engines.sim.timing import PassTiming, PromptTokens


class FakeTime:
    """A clock that moves only when someone sleeps, `overshoot_s` more than asked for."""

    def __init__(self, overshoot_s=0.0):
        self.now_s, self.overshoot_s, self.slept = 100.0, overshoot_s, []

    def clock(self):
        return self.now_s

    def sleep(self, duration_s):
        self.slept.append(duration_s)
        self.now_s += duration_s + self.overshoot_s


def engine(time, **options) -> SimEngine:
    config = EngineConfig("", block_size=16, num_blocks=2048, max_num_tokens=8192, options=options)
    made = SimEngine(config, clock=time.clock, sleep=time.sleep)
    made.start(lambda phase: None)
    return made


def request(number=1, length=100, max_tokens=3) -> Request:
    return Request(RequestId(number), array("i", range(length)), SamplingParams(max_tokens=max_tokens))


def test_prefill_is_the_fitted_polynomial():
    timing = PassTiming()
    assert timing.prefill_s(0) == 0
    assert timing.prefill_s(1) * 1000 == pytest.approx(4.209989e-7 + 1.518344e-2 + 16.50142)
    # A full pass of 8,192 tokens takes 169 ms.
    assert timing.prefill_s(8192) == pytest.approx(0.1691, abs=1e-4)


def test_decode_is_clamped_to_the_range_of_its_fit():
    timing = PassTiming()
    assert timing.decode_s(0, 1000) == 0
    assert timing.decode_s(500, 1000) * 1000 == pytest.approx(-25.74 * 0.25 + 54.01 * 0.5 + 5.74)
    full = timing.decode_s(1000, 1000)
    assert full * 1000 == pytest.approx(-25.74 + 54.01 + 5.74)
    assert timing.decode_s(5000, 1000) == full
    assert PassTiming(usage_limit=0.5).decode_s(900, 1000) == timing.decode_s(500, 1000)
    assert PassTiming(decode_linear_ms=-1000).decode_s(900, 1000) == 0


def test_prompts_of_a_pass_are_timed_by_means_rounded_down():
    assert PromptTokens().timed == 0
    tokens = PromptTokens(num_prompts=3, begins=0 + 8 + 3, ends=10 + 9 + 4)
    assert (tokens.computed, tokens.timed) == (12, 3 * (23 // 3 - 11 // 3))


def test_passes_last_their_time():
    time = FakeTime()
    sim = engine(time)
    sim.add(request())
    steps = [sim.step() for _ in range(3)]
    timing = PassTiming()
    expected = [timing.prefill_s(100), timing.decode_s(101, 2048 * 16), timing.decode_s(102, 2048 * 16)]
    assert time.slept == pytest.approx(expected)
    assert [step.stats.duration_s for step in steps] == pytest.approx(expected)
    assert [step.stats.prefill_tokens for step in steps] == [100, 0, 0]
    assert [step.stats.decode_sequences for step in steps] == [0, 1, 1]
    assert [step.stats.context_tokens for step in steps] == [0, 101, 102]


def test_speed_up_and_slow_factor_scale_every_pass():
    slow, fast = FakeTime(), FakeTime()
    for time, options in ((slow, {"slow_factor": 3.0}), (fast, {"speedup": 10.0})):
        sim = engine(time, **options)
        sim.add(request())
        sim.step()
    assert slow.slept == pytest.approx([PassTiming().prefill_s(100) * 3])
    assert fast.slept == pytest.approx([PassTiming().prefill_s(100) / 10])


def test_nobody_sleeps_at_a_very_high_speed_up():
    time = FakeTime()
    sim = engine(time, speedup=1e6)
    sim.add(request(max_tokens=50))
    while sim.has_work():
        sim.step()
    assert time.slept == []


def test_a_step_that_only_reports_takes_no_time():
    time = FakeTime()
    sim = engine(time)
    sim.add(request())
    sim.abort(RequestId(1))
    assert sim.step().stats is None
    assert time.slept == []


def test_late_wake_ups_do_not_add_up():
    time = FakeTime(overshoot_s=80e-6)
    pacer = Pacer(1.0, time.clock, time.sleep)
    began_s = time.now_s
    for _ in range(100):
        pacer.finish(pacer.begin(), 0.006)
    assert time.now_s - began_s == pytest.approx(0.6 + 80e-6)


def test_idle_time_is_not_made_up_for():
    time = FakeTime()
    pacer = Pacer(1.0, time.clock, time.sleep)
    pacer.finish(pacer.begin(), 0.006)
    time.now_s += LONGEST_LATENESS_S
    pacer.finish(pacer.begin(), 0.006)
    assert time.slept == pytest.approx([0.006, 0.006])


def test_computing_counts_as_part_of_the_pass():
    time = FakeTime()
    pacer = Pacer(1.0, time.clock, time.sleep)
    began_s = pacer.begin()
    time.now_s += 0.004
    assert pacer.finish(began_s, 0.006) == pytest.approx(0.006)
    began_s = pacer.begin()
    time.now_s += 0.009
    assert pacer.finish(began_s, 0.006) == pytest.approx(0.009)
    assert time.slept == pytest.approx([0.002])
