"""Routing as a whole, without a loop: bookings, prefixes, what workers report, and what they fail to report."""

from array import array

import pytest

from trtserve.plugins.api import EngineInfo, PassStats, Request, RequestId, Role, SamplingParams, WorkerId, WorkerLoad
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import Assignment, Plan, PolicyConfig
from trtserve.server.router.core import IndexCheck, RoutingCore
from trtserve.server.router.description import describe

SIZE = 4
A, B = WorkerId("a"), WorkerId("b")


@pytest.fixture
def asked():
    return []


@pytest.fixture
def core(asked):
    policy = PluginManager().make_policy("kv_arrival", PolicyConfig())
    core = RoutingCore(policy, resync=asked.append)
    add(core, A)
    add(core, B)
    return core


def add(core, worker_id, events=True, blocks=100, role=Role.AGG):
    core.add_worker(worker_id, role, EngineInfo(SIZE, blocks, 8, 64, 4096, 1000, publishes_kv_events=events))


def request(number, tokens, salt=""):
    prompt = array("i", tokens)
    hashes = block_hashes(prompt, SIZE, salt)
    return Request(RequestId(number), prompt, SamplingParams(10), block_hashes=hashes, cache_salt=salt)


def place(core, one, now_s=1.0):
    core.hold(one, Role.AGG, now_s)
    (booking,) = core.plan(Role.AGG, now_s)
    return booking


def stored(*hashes):
    return ("stored", hashes)


def test_a_sibling_follows_before_anything_is_stored(core):
    core.remove_worker(B)
    first = place(core, request(1, range(20)))
    second = place(core, request(2, [*range(18), 7, 7]))
    assert (first.predicted_cached_tokens, second.predicted_cached_tokens) == (0, 16)
    assert second.booked.overlap_blocks == 4


def test_a_promise_ends_with_its_request_unless_it_was_kept(core):
    one = request(1, range(20))
    booking = place(core, one)
    core.events(booking.worker_id, 0, [stored(*one.block_hashes[:2])], 1.1)
    core.ended(booking, 1.2)
    slot = booking.worker.view.slot
    assert core.index.overlaps(one.block_hashes) == {slot: 2}
    core.events(booking.worker_id, 1, [("removed", one.block_hashes[:2])], 1.3)
    assert len(core.index) == 0


def test_at_least_one_token_is_computed(core):
    one = request(1, range(16))
    core.events(A, 0, [stored(*one.block_hashes)], 1.0)
    booking = place(core, one)
    assert booking.worker_id == A and booking.predicted_cached_tokens == 12 and booking.booked.overlap_blocks == 4


def test_salts_keep_prefixes_apart(core):
    one = request(1, range(20), salt="tenant")
    core.events(A, 0, [stored(*one.block_hashes)], 1.0)
    assert core.index.overlaps(request(2, range(20)).block_hashes) == {}
    assert core.index.overlaps(request(3, range(20), salt="tenant").block_hashes) == {0: 5}


def test_bookings_count_from_the_decision_to_the_end(core):
    bookings = [place(core, request(number, [number] * 10)) for number in range(1, 7)]
    views = [worker.view for worker in core.workers.values()]
    assert sum(view.booked_requests for view in views) == 6
    assert sum(view.booked_tokens for view in views) == 6 * 20
    for booking in bookings:
        core.ended(booking, 2.0)
    assert all((view.booked_requests, view.booked_tokens, view.context_tokens) == (0, 0, 0) for view in views)
    assert len(core.index) == 0 and core.num_held == core.held_tokens == 0


def test_a_gap_makes_a_worker_unknown_until_it_tells_all(core, asked):
    one = request(1, range(20))
    core.events(A, 0, [stored(*one.block_hashes[:3])], 1.0)
    core.events(A, 2, [stored(one.block_hashes[4])], 1.1)  # event 1 was lost
    assert asked == [A] and core.index.overlaps(one.block_hashes) == {}
    assert core.indexed(A) == (0, 1)
    core.events(A, 3, [], 1.2)
    check = core.snapshot(A, 3, one.block_hashes)
    assert check == IndexCheck(was_known=False, stored_blocks=5, missing_blocks=5, extra_blocks=0)
    assert core.index.overlaps(one.block_hashes) == {0: 5} and asked == [A]


def test_a_step_without_events_shows_that_some_were_lost(core, asked):
    core.events(A, 4, [], 1.0)
    assert asked == [A]


def test_more_blocks_than_there_are_is_a_gap_too(core, asked):
    core.events(A, 0, [stored(*range(1, 102))], 1.0)
    assert asked == [A] and core.indexed(A) == (0, 1)


def test_a_restarted_worker_begins_with_nothing(core, asked):
    one = request(1, range(20))
    core.events(A, 0, [stored(*one.block_hashes)], 1.0)
    lost = place(core, one)
    assert lost.worker_id == A
    core.remove_worker(A)
    assert len(core.index) == 0
    add(core, A)
    again = place(core, request(2, range(20)))
    core.ended(lost, 2.0)  # its request failed; the new incarnation's books are not touched
    assert core.workers[again.worker_id].view.booked_requests == 1
    core.events(A, 0, [stored(*one.block_hashes)], 2.0)
    assert core.indexed(A) == (5, 0) and asked == []


def test_an_engine_without_events_is_credited_with_what_it_computed():
    core = RoutingCore(PluginManager().make_policy("kv_arrival", PolicyConfig()))
    add(core, A, events=False, blocks=6)
    for number in (1, 2):
        one = request(number, [number] * 20)
        booking = place(core, one)
        assert core.prompt_done(A, one.id, 0) is booking
        core.ended(booking, 1.5)
    # Room for six blocks: the last of the five of each are the ones that went.
    assert core.index.num_stored(0) == 6
    assert core.index.overlaps(request(3, [2] * 20).block_hashes) == {0: 5}


def test_reports_about_strangers_change_nothing(core):
    nobody = WorkerId("nobody")
    core.events(nobody, 0, [stored(1)], 1.0)
    core.pass_ended(nobody, None, WorkerLoad(), 0, 0, 1.0)
    assert core.prompt_done(nobody, RequestId(1), 0) is None and core.prompt_done(A, RequestId(1), 0) is None
    assert core.snapshot(nobody, 0, [1]) is None and len(core.index) == 0


def test_what_is_stored_is_not_unused(core):
    core.events(A, 0, [stored(*range(1, 41))], 1.0)
    core.pass_ended(A, PassStats(0.01, 0, 3, 50), WorkerLoad(running=3), 3, 3, 1.0)
    assert core.workers[A].view.unused_blocks == 100 - 40 - 3


def test_what_a_warm_up_taught_counts_for_every_idle_worker_alike(core):
    """An idle worker costs the passes of the prompt, whatever was believed of speeds when it came."""
    for length in (8, 32, 64):
        core.learn(A, PassStats(0.2 + length / 100, length, 0, 0))
    for context in (8, 64, 64):
        core.learn(A, PassStats(0.1, 0, 1, context))
    booking = place(core, request(1, range(20)))
    assert booking.cost_ms == pytest.approx(400, rel=0.05)


def test_a_prediction_is_the_first_workers_that_could_compute_the_prompt(core):
    for length in (8, 32, 64):
        core.learn(A, PassStats(length / 100, length, 0, 0))
    one = request(1, range(40))
    core.events(B, 0, [stored(*one.block_hashes[:5])], 1.0)
    found = core.predict(one, Role.AGG, 1.0)
    assert (found.new_tokens, found.wait_ms, found.decoding) == (20, 0.0, 0)
    assert found.compute_ms == pytest.approx(200, rel=0.1)
    assert core.predict(one, Role.DECODE, 1.0) is None


def test_the_description_is_plain_data(core):
    place(core, request(1, range(20)))
    state = describe(core, "kv_arrival", 1.0)
    assert state["policy"] == "kv_arrival" and state["index"] == {"blocks": 5}
    assert [worker["booked_requests"] for worker in state["workers"]] == [1, 0]
    assert state["workers"][0]["reserved_blocks"] == 5 and set(state["pass_times"]) == {"agg"}


def test_the_description_says_what_is_held():
    core = RoutingCore(PluginManager().make_policy("round_robin", PolicyConfig()))
    core.hold(request(1, range(20)), Role.AGG, 1.0)
    assert core.plan(Role.AGG, 1.0) == [] and describe(core, "", 1.0)["held"] == {"requests": 1, "prompt_tokens": 20}
    core.let_go(RequestId(1), Role.AGG)
    assert describe(core, "", 1.0)["held"] == {"requests": 0, "prompt_tokens": 0}


def test_a_request_may_be_held_for_two_roles_at_once(core):
    one = request(1, range(20))
    for role in (Role.PREFILL, Role.DECODE):
        core.hold(one, role, 1.0)
    assert (core.num_held, core.held_tokens) == (2, 40)
    core.let_go(one.id, Role.DECODE)
    assert (core.num_held, core.held_tokens) == (1, 20)
    core.let_go(one.id, Role.PREFILL)
    assert (core.num_held, core.held_tokens) == (0, 0)


def test_a_request_booked_twice_on_a_worker_leaves_nothing(core):
    core.remove_worker(B)
    one = request(1, range(20))
    first, second = place(core, one), place(core, one)
    for booking in (first, second):
        core.ended(booking, 2.0)
    assert len(core.index) == 0 and not core.workers[A].bookings and core.workers[A].view.booked_requests == 0


class Answers:
    """A policy that answers what it is told to."""

    uses_prefixes = False

    def __init__(self, *plans):
        self._plans = list(plans)

    def assign(self, held, state):
        answer = self._plans.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Plan([Assignment(RequestId(number), WorkerId(worker)) for number, worker in answer])


@pytest.mark.parametrize(
    "answer",
    [
        [(1, "a"), (99, "a")],
        [(1, "a"), (1, "b")],
        [(1, "a"), (2, "nobody")],
        [(1, "a"), *((n, "b") for n in range(2, 12))],
    ],
    ids=["a stranger", "twice", "no worker", "too many"],
)
def test_a_plan_that_cannot_be_books_nothing(answer):
    core = RoutingCore(Answers(answer))
    add(core, A)
    add(core, B)
    for number in range(1, 12):
        core.hold(request(number, range(8)), Role.AGG, 1.0)
    with pytest.raises(ValueError, match="the plan"):
        core.plan(Role.AGG, 1.0)
    assert core.num_held == 11 and all(worker.view.booked_requests == 0 for worker in core.workers.values())


def test_what_was_placed_before_a_failure_is_placed():
    core = RoutingCore(Answers([(number, "a") for number in range(1, 5)], RuntimeError("not now")))
    core.add_worker(A, Role.AGG, EngineInfo(SIZE, 5000, 400, 64, 4096, 1000))
    for number in range(1, 301):
        core.hold(request(number, range(8)), Role.AGG, 1.0)
    assert len(core.plan(Role.AGG, 1.0)) == 4 and core.num_held == 296


def test_without_a_prefix_cache_nothing_is_predicted():
    core = RoutingCore(PluginManager().make_policy("kv_arrival", PolicyConfig()))
    info = EngineInfo(SIZE, 100, 8, 64, 4096, 1000, publishes_kv_events=False, caches_prefixes=False)
    core.add_worker(A, Role.AGG, info)
    for number in (1, 2):
        booking = place(core, request(number, range(20)))
        core.prompt_done(A, booking.request.id, 0)
        assert booking.predicted_cached_tokens == 0 and len(core.index) == 0
        core.ended(booking, 2.0)


def test_prefills_are_no_answers(core):
    core.add_worker(WorkerId("p"), Role.PREFILL, EngineInfo(SIZE, 100, 8, 64, 4096, 1000))
    before = core.traffic.report().num_sequences
    core.hold(request(1, range(20)), Role.PREFILL, 1.0)
    (booking,) = core.plan(Role.PREFILL, 1.0)
    core.prompt_done(booking.worker_id, booking.request.id, 0)
    core.ended(booking, 2.0)
    assert core.traffic.report().num_sequences == before


def test_an_event_storm_leaves_the_index_true(core, asked):
    """Five hundred changes a step, at the cache's capacity, with two steps lost on the way."""
    core.add_worker(A, Role.AGG, EngineInfo(SIZE, 1000, 8, 64, 4096, 1000))
    truth, number = {}, 0
    for turn in range(200):
        changes = []
        for block in range(turn * 250, turn * 250 + 250):
            if len(truth) == 1000:
                oldest = next(iter(truth))
                del truth[oldest]
                changes.append(("removed", (oldest,)))
            truth[block] = None
            changes.append(("stored", (block,)))
        if turn not in (50, 120):
            core.events(A, number, changes, 1.0 + turn)
        number += len(changes)
        if asked:
            asked.clear()
            core.snapshot(A, number, list(truth))
    assert core.indexed(A) == (1000, 2)
    assert set(core.index.stored(core.workers[A].view.slot)) == set(truth)
