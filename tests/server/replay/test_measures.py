import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.server.replay.measures import Gaps, MeasuredRequest, Times, quantile, summed_up

GAPS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 20)), min_size=1, max_size=30)


@given(GAPS, st.floats(0, 1))
def test_gaps_are_the_quantiles_and_mean_of_all_of_them(rows, share):
    gaps, plain = Gaps(), []
    for microseconds, count in rows:
        gaps.add(microseconds / 1e6, count)
        plain += [microseconds / 1e6] * count
    assert gaps.quantile_s(share) == pytest.approx(quantile(sorted(plain), share), abs=1e-9)
    assert gaps.mean_s == pytest.approx(sum(plain) / len(plain))


def test_quantiles_lie_between_neighbours():
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([1.0, 2.0, 4.0], 1.0) == 4.0
    assert quantile([5.0], 0.99) == 5.0


def test_times_are_milliseconds():
    assert Times.of([0.004, 0.001, 0.002]) == Times(
        pytest.approx(7 / 3), 2.0, pytest.approx(3.6), pytest.approx(3.96), 4.0
    )


def test_a_request_is_measured_from_its_arrival():
    now_s, gaps = [10.0], Gaps()
    request = MeasuredRequest(100, 10.0, lambda: now_s[0], gaps)
    request.placed(3, 0.25)
    request.placed(1, 9.0)  # a later phase
    request.cached(32)
    for now_s[0], count in ((10.5, 1), (10.7, 2), (11.0, 1)):
        request.push([1] * count, None)
    other = MeasuredRequest(300, 10.0, lambda: now_s[0], gaps)
    other.placed(0, 0.0)
    other.push([1], None)
    result = summed_up([request, other], gaps, 12.5)
    assert result.summary() == {
        "requests": 2,
        "hit_rate": 0.08,
        "ttft_ms": {"mean": 750.0, "p50": 750.0, "p90": 950.0, "p99": 995.0, "max": 1000.0},
        "itl_ms": {"mean": 166.6667, "p99": 296.0},
        "e2e_ms": {"mean": 1000.0, "p50": 1000.0, "p99": 1000.0},
        "held_share": 0.5,
        "hold_ms_mean": 125.0,
        "decision_us_mean": 12.5,
    }
    assert result.assignments == [(3, 10250.0), (0, 10000.0)]


def test_without_second_tokens_there_are_no_gaps():
    request = MeasuredRequest(100, 0.0, lambda: 1.0, Gaps())
    request.push([1], None)
    assert summed_up([request], Gaps(), 0.0).summary()["itl_ms"] == {"mean": None, "p99": None}
