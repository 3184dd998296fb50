"""A worker's load: exact bookings, and the pass under way as estimated."""

from array import array
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import EngineInfo, PassStats, Request, RequestId, Role, SamplingParams, WorkerId, WorkerLoad
from trtserve.plugins.routing_api import Curve, PassTimes, WorkerView
from trtserve.server.router.speeds import PassTimeModel
from trtserve.server.router.worker_load import Booked, TrackedLoad

BUDGET = 100
TIMES = PassTimes(Curve(10.0, 1.0, 0.0, 1, BUDGET), Curve(5.0, 0.0, 0.0, 0, 1))  # 10 + n ms; 5 ms


def make():
    info = EngineInfo(10, 1000, 8, BUDGET, 4096, 1000)
    view = WorkerView(WorkerId("w"), Role.AGG, info, 0, TIMES)
    return TrackedLoad(view, PassTimeModel(TIMES))


def booked(number, prompt_tokens, sent_s, cached=0, max_tokens=50):
    request = Request(RequestId(number), array("i", [1] * prompt_tokens), SamplingParams(max_tokens))
    return Booked(request, cached // 10, sent_s, prompt_tokens - cached)


def step(tracked, now_s, prefill=0, decoding=0, context=0, rows=0):
    stats = PassStats(0.01, prefill, decoding, context) if prefill or decoding else None
    tracked.pass_ended(stats, WorkerLoad(), rows, rows, now_s)


def test_an_idle_worker_takes_what_comes_in_one_instant_into_one_pass():
    tracked = make()
    tracked.send(booked(1, 30, sent_s=1.0))
    tracked.observe(1.0)
    assert (tracked.view.queued_tokens, tracked.view.queued_prompts, tracked.view.is_prefilling) == (30, 1, False)
    assert tracked.view.pass_ends_s <= 1.0
    tracked.send(booked(2, 20, sent_s=1.0))
    assert (tracked.view.queued_tokens, tracked.view.queued_prompts) == (50, 2)
    tracked.observe(1.001)
    assert tracked.view.is_prefilling and tracked.view.pass_ends_s == pytest.approx(1.0 + 0.060)
    assert (tracked.view.queued_tokens, tracked.view.queued_prompts) == (0, 0)


def test_what_comes_during_a_pass_waits_for_the_next():
    tracked = make()
    tracked.send(booked(1, 30, sent_s=1.0))
    tracked.observe(1.01)
    tracked.send(booked(2, 150, sent_s=1.01))
    tracked.send(booked(3, 20, sent_s=1.01))
    # 170 tokens: one full pass, then 70 of which 50 are the second prompt's rest
    assert (tracked.view.queued_tokens, tracked.view.queued_prompts) == (170, 2)
    assert tracked.view.pass_ends_s == pytest.approx(1.04)


def test_reports_move_prompts_on_and_begin_the_next_pass():
    tracked = make()
    first, second = booked(1, 30, 1.0), booked(2, 150, 1.0)
    tracked.send(first)
    tracked.send(second)
    tracked.observe(1.001)
    assert tracked.view.queued_tokens == 80  # the pass took 30 + 70
    tracked.prompt_done(first, 0)
    step(tracked, 1.2, prefill=100, rows=1)
    assert first.is_prompt_done and second.computed_tokens == 70
    assert tracked.view.decoding == 1 and tracked.view.context_tokens == 181
    assert tracked.view.queued_tokens == 0 and tracked.view.is_prefilling  # the rest of the second one
    assert tracked.view.pass_ends_s == pytest.approx(1.2 + 0.010 + 0.080 + 0.005)


def test_a_wrong_prediction_of_the_cache_is_put_right():
    tracked = make()
    one, other = booked(1, 60, 1.0, cached=0), booked(2, 60, 1.0, cached=0)
    tracked.send(one)
    tracked.send(other)
    tracked.observe(1.001)
    tracked.prompt_done(one, 50)  # only 10 of its tokens were computed
    step(tracked, 1.1, prefill=60, rows=1)  # so 50 are the other one's
    assert other.remaining_tokens == 10


def test_a_prompt_that_gets_no_room_does_not_count_as_a_pass_under_way():
    tracked = make()
    runs = booked(1, 30, 1.0)
    tracked.send(runs)
    tracked.observe(1.001)
    tracked.prompt_done(runs, 0)
    step(tracked, 1.04, prefill=30, rows=1)
    tracked.send(booked(2, 50, 1.041))  # its KV blocks are not free: passes go on without it
    step(tracked, 1.045, decoding=1, context=30, rows=1)
    assert tracked.view.is_prefilling  # it could have come too late for that pass
    step(tracked, 1.050, decoding=1, context=31, rows=1)
    assert not tracked.view.is_prefilling and tracked.view.queued_tokens == 50


def test_generated_tokens_are_counted_by_passes():
    tracked = make()
    request = booked(1, 30, 1.0)
    tracked.send(request)
    assert tracked.generated_tokens(request) == 0
    tracked.prompt_done(request, 0)
    step(tracked, 1.1, prefill=30, rows=1)
    assert tracked.generated_tokens(request) == 1
    for number in range(4):
        step(tracked, 1.2 + number, decoding=1, context=31 + number, rows=1)
    assert tracked.generated_tokens(request) == 5
    assert tracked.view.context_tokens == 35


@given(st.data())
def test_when_all_have_ended_nothing_is_left(data):
    tracked, live, now_s = make(), [], 1.0
    for number in range(1, data.draw(st.integers(1, 12))):
        now_s += data.draw(st.floats(0, 0.1))
        tracked.observe(now_s)
        request = booked(number, data.draw(st.integers(1, 300)), now_s)
        tracked.send(request)
        live.append(request)
        if data.draw(st.booleans()):
            tracked.prompt_done(live[0], data.draw(st.integers(0, len(live[0].request.prompt))))
            step(tracked, now_s, prefill=data.draw(st.integers(0, 100)), rows=1)
        if data.draw(st.booleans()):
            tracked.ended(live.pop(data.draw(st.integers(0, len(live) - 1))))
        view = tracked.view
        assert view.booked_requests == len(live)
        assert view.booked_tokens == sum(len(one.request.prompt) + 50 for one in live)
        assert view.decoding == sum(one.is_prompt_done for one in live)
        assert view.context_tokens >= 0 and view.queued_tokens >= 0 and view.queued_prompts <= len(live)
    for request in live:
        tracked.ended(request)
    view = tracked.view
    assert (view.booked_requests, view.booked_tokens, view.decoding) == (0, 0, 0)
    assert (view.context_tokens, view.queued_tokens, view.queued_prompts) == (0, 0, 0)


def test_an_engine_without_statistics_is_followed_as_well():
    tracked = make()
    first = booked(1, 350, 1.0)
    tracked.send(first)
    tracked.observe(1.001)
    assert tracked.view.queued_tokens == 250
    tracked.prompt_done(first, 0)
    tracked.pass_ended(None, WorkerLoad(free_blocks=900), 1, 1, 1.5)
    assert tracked.view.queued_tokens == 0 and not tracked.view.is_prefilling and tracked.view.decoding == 1


def test_context_does_not_drift_where_requests_end_early():
    tracked = make()
    keeps = booked(1, 30, 1.0)
    tracked.send(keeps)
    tracked.prompt_done(keeps, 0)
    step(tracked, 1.1, prefill=30, rows=1)
    for number in range(2, 50):
        stopped = booked(number, 10, 1.2)
        tracked.send(stopped)
        tracked.prompt_done(stopped, 0)
        tracked.ended(stopped)  # by a stop string: the worker says a few tokens more
        step(tracked, 1.3, decoding=2, context=45, rows=2)
    assert tracked.view.context_tokens == 47


@given(st.data())
def test_asking_for_the_view_changes_nothing(data):
    """What is estimated late is as if it had been estimated at once."""
    asked, unasked, live, now_s = make(), make(), [], 1.0
    for number in range(1, data.draw(st.integers(2, 20))):
        now_s += data.draw(st.sampled_from([0.0, 0.0001, 0.02, 0.3]))
        tokens, row = data.draw(st.integers(1, 300)), data.draw(st.integers(0, len(live)))
        match data.draw(st.sampled_from(["send", "prompt", "pass", "bare pass", "end", "observe"])):
            case "send":
                live.append((booked(number, tokens, now_s), booked(number, tokens, now_s)))
                for tracked, one in zip((asked, unasked), live[-1], strict=True):
                    tracked.send(one)
            case "prompt" if live:
                for tracked, one in zip((asked, unasked), live[row - 1], strict=True):
                    tracked.prompt_done(one, 0)
            case "pass":
                for tracked in (asked, unasked):
                    step(tracked, now_s, prefill=tokens % 3 * 40, decoding=row, context=row * 30, rows=row)
            case "bare pass":
                for tracked in (asked, unasked):
                    step(tracked, now_s, rows=row)
            case "end" if live:
                for tracked, one in zip((asked, unasked), live.pop(row - 1), strict=True):
                    tracked.ended(one)
            case _:
                for tracked in (asked, unasked):
                    tracked.observe(now_s)
        asked.view  # noqa: B018  # that it is asked is the point
    assert asdict(asked.view) == asdict(unasked.view)
