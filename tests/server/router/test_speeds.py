"""Learning how long passes take: from noisy ones, from monotonous ones, from outliers, and after a change of speed."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import PassStats
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.routing_api import Curve, PassTimes
from trtserve.server.router.speeds import START, PassTimeModel

KV_TOKENS = 1_048_576
TRUE = PassTiming()
USAGES = [0.05 * step for step in range(1, 21)]
LENGTHS = [256 * step for step in range(1, 33)]
PROBE = [(16, 0.0), (256, 0.0), (2048, 0.0), (0, 0.001), (0, 0.001), (0, 0.01), (0, 0.01)]


def a_pass(tokens, usage, speed=1.0):
    context = round(usage * KV_TOKENS)
    duration_s = TRUE.prefill_s(tokens) + TRUE.decode_s(context, KV_TOKENS)
    return PassStats(duration_s * speed, tokens, 8 if context else 0, context)


def noisy(stats, rng, noise):
    factor = 1 + rng.uniform(-noise, noise)
    return PassStats(stats.duration_s * factor, stats.prefill_tokens, stats.decode_sequences, stats.context_tokens)


def observe_mixture(model, rng, count, noise=0.0, speed=1.0):
    """Decode-only passes, prefills alone, and passes with both."""
    for _ in range(count):
        tokens = rng.randint(1, 8192) if rng.random() < 0.5 else 0
        usage = rng.random() if not tokens or rng.random() < 0.7 else 0.0
        model.observe(noisy(a_pass(tokens, usage, speed), rng, noise), KV_TOKENS)


def prefill_error(times, lengths=LENGTHS, speed=1.0):
    return max(abs(times.prefill_ms(n) / (TRUE.prefill_s(n) * 1000 * speed) - 1) for n in lengths)


def decode_error(times, usages=USAGES, speed=1.0):
    return max(
        abs(times.decode_ms(u) / (TRUE.decode_s(round(u * KV_TOKENS), KV_TOKENS) * 1000 * speed) - 1) for u in usages
    )


def make_probed():
    model = PassTimeModel()
    for tokens, usage in PROBE:
        model.observe(a_pass(tokens, usage), KV_TOKENS)
    return model


# ------------------------------------------------------------------ learning


def test_start_values_are_usable():
    times = PassTimeModel().times
    assert times == START
    assert 0 < times.prefill_ms(100) < times.prefill_ms(8192)
    assert 0 < times.decode_ms(0.1) < times.decode_ms(1.0)


def test_the_first_pass_sets_the_scale():
    model = PassTimeModel()
    model.observe(PassStats(START.prefill_ms(100) * 7 / 1000, 100, 0, 0), KV_TOKENS)
    assert model.times.prefill_ms(100) == pytest.approx(7 * START.prefill_ms(100), rel=1e-6)
    assert model.times.prefill_ms(4000) == pytest.approx(7 * START.prefill_ms(4000), rel=1e-6)
    assert model.times.decode == START.decode


def test_a_warm_up_probe_is_enough_within_its_range():
    times = make_probed().times
    assert prefill_error(times, [16, 100, 256, 1000, 2048]) < 0.02
    assert decode_error(times, [0.001, 0.005, 0.01]) < 0.02
    assert (times.prefill.low, times.prefill.high) == (16, 2048)


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_the_true_curve_from_noisy_passes(seed):
    rng, model = random.Random(seed), PassTimeModel()
    observe_mixture(model, rng, 1500, noise=0.05)
    assert prefill_error(model.times) < 0.02
    assert decode_error(model.times) < 0.02


def test_without_noise_it_is_exact():
    model = PassTimeModel()
    observe_mixture(model, random.Random(1), 1500)
    assert prefill_error(model.times) < 1e-3
    assert decode_error(model.times) < 1e-3


def test_errors_are_told_apart():
    model = PassTimeModel()
    observe_mixture(model, random.Random(1), 1000)
    for _ in range(500):
        model.observe(noisy(a_pass(0, 0.3), random.Random(2), 0.0), KV_TOKENS)
    before = model.report()
    assert before.decode.relative_error == pytest.approx(0, abs=1e-3)
    model.observe(a_pass(4096, 0.0, speed=2.0), KV_TOKENS)
    after = model.report()
    assert after.prefill.relative_error > before.prefill.relative_error + 0.005
    assert after.decode == before.decode
    assert after.prefill.num_passes == before.prefill.num_passes + 1


def test_nothing_observed_nothing_reported():
    report = PassTimeModel().report()
    assert (report.prefill.relative_error, report.prefill.num_passes) == (None, 0)


# ------------------------------------------------------------------ what must not upset it


def test_monotonous_passes_leave_the_rest_of_the_curve_alone():
    rng, model = random.Random(3), PassTimeModel()
    observe_mixture(model, rng, 1000, noise=0.02)
    passes = [noisy(a_pass(0, 0.3), rng, 0.05) for _ in range(1000)]
    for _ in range(100):
        for stats in passes:
            model.observe(stats, KV_TOKENS)
    assert decode_error(model.times) < 0.03
    model.observe(a_pass(0, 0.9, speed=1.2), KV_TOKENS)  # one odd pass elsewhere
    assert decode_error(model.times) < 0.05


def test_it_follows_a_change_of_speed_after_monotonous_passes():
    rng, model = random.Random(4), PassTimeModel()
    observe_mixture(model, rng, 1000, noise=0.02)
    stats = a_pass(0, 0.3)
    for _ in range(100_000):
        model.observe(stats, KV_TOKENS)
    for _ in range(300):
        model.observe(noisy(a_pass(0, rng.random(), speed=1.3), rng, 0.02), KV_TOKENS)
    assert decode_error(model.times, speed=1.3) < 0.03
    for _ in range(300):
        model.observe(noisy(a_pass(rng.randint(1, 8192), 0.0, speed=1.3), rng, 0.02), KV_TOKENS)
    assert prefill_error(model.times, speed=1.3) < 0.05


def test_it_follows_a_change_of_speed_at_the_same_usage():
    model = make_probed()
    for speed in (1.0, 1.3, 0.7):
        for _ in range(2000 if speed == 1.0 else 200):
            model.observe(a_pass(0, 0.3, speed), KV_TOKENS)
        assert decode_error(model.times, [0.3], speed) < 0.01


def test_one_slow_pass_changes_little():
    rng, model = random.Random(5), PassTimeModel()
    observe_mixture(model, rng, 500, noise=0.02)
    before = decode_error(model.times), prefill_error(model.times)
    model.observe(a_pass(0, 0.5, speed=50), KV_TOKENS)
    model.observe(a_pass(3000, 0.0, speed=50), KV_TOKENS)
    assert decode_error(model.times) < before[0] + 0.01
    assert prefill_error(model.times) < before[1] + 0.01


@pytest.mark.parametrize("speed", [50, 5, 0.2, 0.02])
def test_an_odd_first_pass_is_soon_forgotten(speed):
    rng, model = random.Random(6), PassTimeModel()
    model.observe(a_pass(16, 0.0, speed), KV_TOKENS)
    model.observe(a_pass(0, 0.01, speed), KV_TOKENS)
    observe_mixture(model, rng, 600, noise=0.02)
    assert prefill_error(model.times) < 0.05
    assert decode_error(model.times) < 0.05


def test_decodes_do_not_poison_prefill_before_decode_is_known():
    model = PassTimeModel()
    for tokens in (500, 1000, 4000):
        model.observe(a_pass(tokens, 0.9), KV_TOKENS)
    assert model.times == START
    assert model.report().prefill.num_passes == 0


def test_mixed_passes_teach_decode_beyond_its_range_and_prefill_else():
    rng, model = random.Random(7), make_probed()
    for _ in range(300):
        model.observe(noisy(a_pass(rng.randint(16, 2048), rng.uniform(0.3, 0.8)), rng, 0.01), KV_TOKENS)
    times = model.times
    assert times.decode.high > 0.7
    assert decode_error(times, [0.4, 0.5, 0.6, 0.7]) < 0.05
    assert prefill_error(times, [256, 512, 1024, 2048]) < 0.05


def test_passes_that_tell_nothing_are_ignored():
    model = make_probed()
    before = model.times
    for stats in [
        PassStats(0.0, 10, 0, 0),
        PassStats(-1.0, 10, 0, 0),
        PassStats(float("nan"), 10, 0, 0),
        PassStats(float("inf"), 10, 0, 0),
        PassStats(0.01, 0, 0, 0),
    ]:
        model.observe(stats, KV_TOKENS)
    model.observe(PassStats(0.01, 0, 1, 10), 0)
    assert model.times is before


def test_a_falling_fit_is_bent_not_broken():
    """The true curve is nearly flat at a full cache: noise tips the fit over there."""
    rng, model = random.Random(8), PassTimeModel()
    for _ in range(300):
        model.observe(noisy(a_pass(0, rng.uniform(0.5, 1.0)), rng, 0.1), KV_TOKENS)
        decode = model.times.decode
        assert decode.linear + 2 * decode.quadratic * decode.high >= -1e-5
    assert decode_error(model.times, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]) < 0.05


def test_a_speed_that_falls_with_load_is_taken_for_constant():
    model = PassTimeModel()
    for step in range(400):
        usage = step % 10 / 10 + 0.05
        model.observe(PassStats((20 - 10 * usage) / 1000, 0, 1, round(usage * KV_TOKENS)), KV_TOKENS)
    decode = model.times.decode
    assert decode.at(decode.low) == pytest.approx(decode.at(decode.high), rel=1e-3)
    assert 10 < decode.at(0.5) < 20


# ------------------------------------------------------------------ pins


def test_pinned_times_are_given_while_others_are_learnt():
    pinned = PassTimes(Curve(1, 2, 3, 1, 100), Curve(4, 5, 6, 0, 1))
    model = PassTimeModel(pinned)
    observe_mixture(model, random.Random(9), 1000)
    assert model.times is pinned
    report = model.report()
    assert report.pinned is pinned
    assert prefill_error(PassTimes(report.prefill.curve, report.decode.curve)) < 0.01


# ------------------------------------------------------------------ any input

ANY_PASS = st.builds(
    PassStats,
    st.floats(1e-7, 1e5),
    st.one_of(st.just(0), st.integers(0, 100_000)),
    st.just(1),
    st.one_of(st.just(0), st.integers(0, 2 * KV_TOKENS)),
)


def is_rising(curve, slack):
    step = (curve.high - curve.low) / 20
    values = [curve.at(curve.low + step * number) for number in range(21)]
    return all(0 <= a <= b + slack for a, b in pairwise(values))


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_PASS, max_size=60), st.integers(1, 20))
def test_times_are_physical_whatever_is_observed(passes, repeats):
    model = PassTimeModel()
    for _ in range(repeats):
        for stats in passes:
            model.observe(stats, KV_TOKENS)
    times = model.times
    for curve in (times.prefill, times.decode):
        size = abs(curve.constant) + abs(curve.linear) * curve.high + abs(curve.quadratic) * curve.high**2
        assert is_rising(curve, 1e-7 * size)
    assert times.prefill_ms(0) == 0
    assert 0 <= times.prefill_ms(10) < float("inf")
    assert times.decode_ms(2.0) == times.decode_ms(times.decode.high)


@given(st.integers(3000, 1_000_000), st.floats(0.02, 3.0))
def test_outside_the_range_seen(tokens, usage):
    times = make_probed().times
    assert times.prefill_ms(tokens) == pytest.approx(times.prefill_ms(2048) * tokens / 2048)
    assert times.prefill_ms(1) == times.prefill_ms(16)
    assert times.decode_ms(usage) == pytest.approx(times.decode_ms(0.01), rel=1e-3)


def test_of_many_passes_a_few_teach():
    model = PassTimeModel()
    decode, prefill = PassStats(0.001, 0, 8, 100), PassStats(0.001, 64, 8, 100)
    wanted = [model.wants(decode, now_s) for now_s in (1.0, 1.0001, 1.0004, 1.0006, 1.01)]
    assert wanted == [True, False, False, True, True]
    wanted = [model.wants(prefill, now_s) for now_s in (1.01, 1.0149, 1.0151, 1.02)]
    assert wanted == [True, False, True, False], "passes with prompts are counted by themselves"
