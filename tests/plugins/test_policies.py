"""Routing policies: never more than fits, nobody passed over, the same answer for the same past."""

from array import array
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import EngineInfo, Request, RequestId, Role, SamplingParams, WorkerId
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import (
    Curve,
    Estimates,
    HeldRequest,
    PassTimes,
    PolicyConfig,
    RoutingState,
    WorkerView,
)

POLICIES = ("round_robin", "random", "least_loaded")


TIMES = PassTimes(Curve(5.0, 0.02, 0.0, 1, 512), Curve(5.0, 20.0, 0.0, 0, 1))

manager = cache(PluginManager)


def make(name, seed=0):
    return manager().make_policy(name, PolicyConfig(seed))


def held(number, num_tokens=4, max_tokens=4):
    request = Request(RequestId(number), array("i", [1] * num_tokens), SamplingParams(max_tokens))
    return HeldRequest(request, Role.AGG, 0.0)


def view(worker_id, slots, booked=0, tokens=0):
    info = EngineInfo(16, 100, slots, 512, 4096, 1000)
    return WorkerView(
        WorkerId(worker_id), Role.AGG, info, ord(worker_id), TIMES, booked_requests=booked, booked_tokens=tokens
    )


def assign(policy, waiting, views, now_s=0.0):
    """[(request id, worker id)]"""
    plan = policy.assign(waiting, RoutingState(now_s, views, Estimates(256.0, 0.3, 60.0)))
    return [(assignment.request_id, assignment.worker_id) for assignment in plan.assignments]


@st.composite
def situations(draw):
    """Held requests and at least one worker, some of them full."""
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    views = [
        view(name, slots := draw(st.integers(1, 5)), draw(st.integers(0, slots)), draw(st.integers(0, 50)))
        for name in names
    ]
    sizes = draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=12))
    return [held(number, *size) for number, size in enumerate(sizes, 1)], views


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(st.lists(situations(), min_size=1, max_size=6))
def test_all_room_is_used_and_no_more(name, past):
    policy = make(name)
    for waiting, views in past:
        assignments = assign(policy, waiting, views, 0.0)
        room = sum(max(view.free_slots, 0) for view in views)
        # First come, first served, until there is no room.
        served = [request.request.id for request in waiting][: min(room, len(waiting))]
        assert [request_id for request_id, _ in assignments] == served
        given_to = Counter(worker_id for _, worker_id in assignments)
        for worker in views:
            assert given_to[worker.worker_id] <= worker.free_slots


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(st.lists(situations(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_the_same_past_gives_the_same_answer(name, past, seed):
    one, other = make(name, seed), make(name, seed)
    for now_s, (waiting, views) in enumerate(past):
        assert list(assign(one, waiting, views, now_s)) == list(assign(other, waiting, views, now_s + 1000.0))


@settings(deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=40))
def test_round_robin_takes_turns_while_workers_come_and_go(ready):
    """Between two turns of a worker, every other one that was there all the time had one."""
    policy = make("round_robin")
    turns = []
    for number, names in enumerate(ready, 1):
        ((_, chosen),) = assign(policy, [held(number)], [view(name, 100) for name in names], 0.0)
        assert chosen in names
        earlier = [turn for turn, worker in enumerate(turns) if worker == chosen]
        if earlier:
            between = set(turns[earlier[-1] + 1 :])
            always_there = set.intersection(*ready[earlier[-1] : number])
            assert always_there - {chosen} <= between
        turns.append(chosen)


def test_round_robin_spreads_evenly():
    policy = make("round_robin")
    views = [view(name, 100) for name in "cab"]
    chosen = [assign(policy, [held(number)], views, 0.0)[0][1] for number in range(1, 10)]
    assert chosen == [*"abc"] * 3
    at_once = assign(policy, [held(number) for number in range(10, 17)], views, 0.0)
    assert [worker for _, worker in at_once] == [*"abcabca"]


@settings(deadline=None)
@given(situations())
def test_least_loaded_never_passes_over_a_lighter_worker(situation):
    waiting, views = situation
    tokens = {view.worker_id: view.booked_tokens for view in views}
    free = {view.worker_id: view.free_slots for view in views}
    sizes = {one.request.id: len(one.request.prompt) + one.request.sampling.max_tokens for one in waiting}
    for request_id, chosen in assign(make("least_loaded"), waiting, views, 0.0):
        lightest = min((tokens[worker], worker) for worker in tokens if free[worker] > 0)
        assert (tokens[chosen], chosen) == lightest
        tokens[chosen] += sizes[request_id]
        free[chosen] -= 1


def test_random_reaches_everyone_and_depends_on_its_seed():
    views = [view(name, 1000) for name in "abc"]
    many = [held(number) for number in range(1, 301)]
    counts = Counter(worker for _, worker in assign(make("random", 1), many, views, 0.0))
    assert min(counts[name] for name in "abc") > 60
    assert assign(make("random", 1), many, views, 0.0) != assign(make("random", 2), many, views, 0.0)


@pytest.mark.parametrize("name", POLICIES)
def test_full_workers_get_nothing(name):
    assert list(assign(make(name), [held(1)], [view("a", 2, 2), view("b", 1, 3)], 0.0)) == []
