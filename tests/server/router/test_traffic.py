"""Estimates of the traffic, from streams whose answers are known."""

import random
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.routing_api import Estimates
from trtserve.server.router.decayed_mean import DecayedMean
from trtserve.server.router.traffic import START, EvictionAge, Traffic, TrafficOptions


def chain(rng, length):
    return [rng.getrandbits(64) for _ in range(length)]


# ------------------------------------------------------------------ decayed means


def test_the_weight_of_a_sample_halves_in_a_half_life():
    mean = DecayedMean(0.0, half_life=10, start_weight=1.0)
    mean.add(1.0, 10)
    assert mean.value == pytest.approx(10 / 10.5)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_a_mean_is_between_the_least_and_the_greatest(samples):
    mean = DecayedMean(0.0, half_life=5, start_weight=0.0)
    for sample in samples:
        mean.add(sample)
    assert min(samples) - 1e-6 <= mean.value <= max(samples) + 1e-6
    assert mean.num_samples == len(samples)


# ------------------------------------------------------------------ lengths of answers


def test_before_anything_the_start_values_hold():
    assert Traffic().estimates == START


def test_the_first_answers_count_in_full():
    traffic = Traffic()
    for _ in range(10):
        traffic.ended(20)
    assert traffic.estimates.output_tokens == pytest.approx((START.output_tokens + 10 * 20) / 11, rel=0.05)


def test_answers_are_forgotten_by_half_in_a_hundred():
    traffic = Traffic()
    for _ in range(2000):
        traffic.ended(100)
    for _ in range(100):
        traffic.ended(300)
    assert traffic.estimates.output_tokens == pytest.approx(200, rel=0.01)


# ------------------------------------------------------------------ reuse of blocks


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_reuse_is_the_share_of_hits_among_uses(share):
    """A block is used again with probability `share` after each use: a known answer."""
    rng, traffic = random.Random(1), Traffic()
    for second in range(2000):
        blocks = chain(rng, 8)
        traffic.sent(blocks, 0, second)
        while rng.random() < share:
            traffic.sent(blocks, 8, second)
    assert traffic.estimates.reuse_probability == pytest.approx(share, abs=0.03)


def test_life_is_the_mean_age_of_hits():
    rng, traffic = random.Random(2), Traffic()
    soon, late = chain(rng, 64), chain(rng, 64)
    now_s = 0.0
    for _ in range(200):
        for blocks, gap_s in ((soon, 10.0), (late, 30.0)):
            traffic.sent(blocks, 0, now_s)
            now_s += gap_s
            traffic.sent(blocks, 64, now_s)
    sampled = [sum(not block & 15 for block in blocks) for blocks in (soon, late)]
    expected = (sampled[0] * 10 + sampled[1] * 30) / sum(sampled)
    assert traffic.estimates.block_life_s == pytest.approx(expected, rel=0.05)
    assert traffic.report().num_reuses == 200 * sum(sampled)


def test_a_hit_of_an_unknown_block_has_no_age():
    traffic = Traffic()
    traffic.sent([16, 32, 48], 3, 100.0)
    assert traffic.report().num_reuses == 0
    assert traffic.estimates.block_life_s == START.block_life_s


def test_requests_without_full_blocks_tell_nothing():
    traffic = Traffic()
    traffic.sent([], 0, 1.0)
    assert traffic.estimates == START


def test_only_the_latest_used_blocks_are_remembered():
    traffic = Traffic(max_remembered=3)
    for second, block in enumerate([16, 32, 48, 16, 64]):
        traffic.sent([block], 0, float(second))
    assert traffic.report().num_remembered == 3
    assert traffic.ages_s([16, 32, 48, 64], 10.0) == [7.0, 8.0, 6.0]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2**64 - 1), max_size=20), st.floats(0, 1), st.floats(0, 1e4))),
    st.integers(1, 10),
)
def test_estimates_stay_in_their_bounds(requests, limit):
    traffic, now_s = Traffic(max_remembered=limit), 0.0
    for hashes, share, gap_s in requests:
        now_s += gap_s
        traffic.sent(hashes, int(share * len(hashes)), now_s)
        assert traffic.report().num_remembered <= limit
    estimates = traffic.estimates
    assert 0 <= estimates.reuse_probability <= 1
    assert 0 <= estimates.block_life_s <= max(START.block_life_s, now_s)


# ------------------------------------------------------------------ pins


def test_pins_are_given_while_the_rest_is_learnt():
    traffic = Traffic(TrafficOptions(output_tokens=7, block_life_s=3.0))
    for _ in range(500):
        traffic.ended(1000)
        traffic.sent(list(range(16)), 16, 0.0)
    assert traffic.estimates.output_tokens == 7
    assert traffic.estimates.block_life_s == 3.0
    assert traffic.estimates.reuse_probability > 0.7
    assert traffic.report().learnt.output_tokens > 900


def test_estimates_are_made_anew_only_after_news():
    traffic = Traffic()
    before = traffic.estimates
    assert traffic.estimates is before
    traffic.ended(1)
    assert traffic.estimates != before
    assert isinstance(traffic.estimates, Estimates)


# ------------------------------------------------------------------ evictions


def test_nothing_evicted_nothing_to_lose():
    eviction = EvictionAge(Traffic())
    assert (eviction.age_s, eviction.loss(100.0)) == (None, 0.0)


def test_the_loss_follows_from_the_age_of_the_victims():
    rng, traffic = random.Random(3), Traffic()
    eviction = EvictionAge(traffic)
    for second in range(300):
        blocks = chain(rng, 32)
        traffic.sent(blocks, 0, float(second))
        eviction.removed(blocks, second + 60.0)
    assert eviction.age_s == pytest.approx(60.0)
    assert eviction.loss(120.0) == pytest.approx(exp(-0.5))
    assert eviction.loss(0.0) == 0.0


def test_victims_that_are_not_remembered_tell_nothing():
    eviction = EvictionAge(Traffic())
    eviction.removed([1, 2, 16, 32], 5.0)
    assert eviction.age_s is None
