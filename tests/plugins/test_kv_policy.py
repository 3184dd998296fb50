"""The KV-aware policies: who goes where, and who is held, in situations small enough to see why."""

from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtserve.plugins.api import EngineInfo, Request, RequestId, Role, SamplingParams, WorkerId
from trtserve.plugins.policies.kv import KVOptions, KVPolicy, make_policy
from trtserve.plugins.policies.kv.cost import PassCosts
from trtserve.plugins.routing_api import (
    Curve,
    Estimates,
    HeldRequest,
    PassTimes,
    PolicyConfig,
    RoutingState,
    WorkerView,
)

BLOCK, BUDGET = 16, 1024
TIMES = PassTimes(Curve(5.0, 0.1, 0.0, 1, BUDGET), Curve(5.0, 20.0, 0.0, 0, 1))  # 5 + 0.1 n ms; 5 + 20 u ms
ESTIMATES = Estimates(output_tokens=100.0, reuse_probability=0.5, block_life_s=60.0)


INFO = EngineInfo(BLOCK, 2000, 64, BUDGET, 8192, 1000)


def worker(slot, **fields):
    fields = {"unused_blocks": 2000, "free_blocks": 2000} | fields
    return WorkerView(WorkerId(f"w{slot}"), Role.AGG, INFO, slot, TIMES, **fields)


def held(number, tokens, overlaps=None, since_s=9.99):
    request = Request(RequestId(number), array("i", [1]) * tokens, SamplingParams(50))
    return HeldRequest(request, Role.AGG, since_s, lambda: overlaps or {})


def assign(policy, waiting, workers, now_s=10.0):
    return policy.assign(waiting, RoutingState(now_s, workers, ESTIMATES))


def placed(plan):
    return {int(assignment.request_id): assignment.worker_id for assignment in plan.assignments}


@pytest.fixture(params=[True, False], ids=["kv", "kv_arrival"])
def policy(request):
    return KVPolicy(KVOptions(), holds=request.param)


def late():
    return KVPolicy(KVOptions(), holds=True)


def test_names():
    assert make_policy("kv", PolicyConfig()) is not None and make_policy("kv_arrival", PolicyConfig()) is not None
    assert make_policy("other", PolicyConfig()) is None


def test_a_prefix_decides_between_equals(policy):
    workers = [worker(0), worker(1), worker(2)]
    assert placed(assign(policy, [held(1, 200, {1: 8})], workers)) == {1: "w1"}
    assert placed(assign(policy, [held(1, 200, {1: 8, 2: 10})], workers)) == {1: "w2"}


def test_a_long_queue_outweighs_a_prefix(policy):
    workers = [worker(0), worker(1, queued_tokens=5000, queued_prompts=1, is_prefilling=True, pass_ends_s=10.1)]
    assert placed(assign(policy, [held(1, 200, {1: 8})], workers)) == {1: "w0"}


def test_without_prefixes_the_emptier_worker_wins(policy):
    workers = [worker(0, decoding=20, booked_requests=20, context_tokens=16_000, pass_ends_s=10.005), worker(1)]
    assert placed(assign(policy, [held(1, 200)], workers)) == {1: "w1"}


def test_kv_from_another_worker_takes_room_and_no_computing():
    costs = PassCosts(worker(0), block_weight=0.5)
    computed, moved = (costs.prompt(1000, 10, 100.0, moves_kv) for moves_kv in (False, True))
    assert (computed.new, moved.new) == (1000 - 160, 1000 - 62 * BLOCK)
    assert computed.needed_blocks == moved.needed_blocks == 53
    assert moved.prefill_ms == TIMES.prefill_ms(8) < computed.prefill_ms


def test_evicting_what_would_be_used_again_is_avoided(policy):
    fresh, roomy = worker(0, unused_blocks=0, eviction_loss=0.9), worker(1, unused_blocks=50, eviction_loss=0.9)
    assert placed(assign(policy, [held(1, 200)], [fresh, roomy])) == {1: "w1"}
    stale = worker(1, unused_blocks=0, eviction_loss=0.05)
    assert placed(assign(policy, [held(1, 200)], [fresh, stale])) == {1: "w1"}


def test_a_worker_without_kv_space_is_the_last_choice(policy):
    busy = {"booked_requests": 8, "decoding": 8, "decode_ms": 8.0, "decode_slope_ms": 10.0, "unused_blocks": 0}
    crowded = worker(0, **busy, free_blocks=0, pass_ends_s=10.01)
    later = worker(1, **busy, free_blocks=100, pass_ends_s=10.02)
    assert placed(assign(policy, [held(1, 1000)], [crowded, later])) == {1: "w1"}


def test_what_finds_no_kv_space_anywhere_is_held_where_it_can_still_go_elsewhere():
    busy = {"booked_requests": 8, "decoding": 8, "decode_ms": 8.0, "unused_blocks": 0, "pass_ends_s": 10.005}
    full = [worker(slot, **busy, free_blocks=10 + slot) for slot in range(2)]
    assert placed(assign(late(), [held(1, 1000)], full)) == {}
    assert placed(assign(late(), [held(1, 170)], full)) == {1: "w1"}


def test_one_is_held_until_the_best_worker_can_begin():
    """Waiting 40 ms for its prefix of 60 blocks is cheaper than 96 ms of computing it elsewhere."""
    busy = worker(0, is_prefilling=True, pass_ends_s=10.040, booked_requests=1)
    plan = assign(late(), [held(1, 1000, {0: 60})], [busy, worker(1)])
    assert placed(plan) == {} and plan.again_at_s == pytest.approx(10.030)
    plan = assign(late(), [held(1, 1000, {0: 60})], [busy, worker(1)], now_s=10.031)
    assert placed(plan) == {1: "w0"}


def test_a_short_prompt_does_not_share_a_pass_with_a_long_one():
    """Together both would wait for the long one; the short one goes first, the long one into the next pass."""
    plan = assign(late(), [held(1, 1000), held(2, 20)], [worker(0)])
    assert placed(plan) == {2: "w0"}
    together = assign(KVPolicy(KVOptions(), holds=False), [held(1, 1000), held(2, 20)], [worker(0)])
    assert placed(together) == {1: "w0", 2: "w0"}


def test_waiting_moves_a_request_forward():
    """Nobody starves: after a second the long prompt goes first, and the short one that has just come joins it."""
    plan = assign(late(), [held(1, 1000, since_s=9.0), held(2, 20)], [worker(0)])
    assert [int(assignment.request_id) for assignment in plan.assignments] == [1, 2]


def test_a_long_prompt_waits_a_little_for_others_of_its_moment():
    policy = late()
    assert placed(assign(policy, [held(1, 1000, since_s=9.0)], [worker(0)], now_s=9.0)) == {1: "w0"}  # none ever came
    for number in range(2, 10):
        assign(policy, [held(number, 10, since_s=9.9 + number / 1000)], [worker(0)], now_s=9.9 + number / 1000)
    plan = assign(policy, [held(20, 1000, since_s=10.0)], [worker(0)])
    assert placed(plan) == {} and plan.again_at_s == pytest.approx(10.00315)  # 3 % of 105 ms
    assert placed(assign(policy, [held(20, 1000, since_s=10.0)], [worker(0)], now_s=10.0032)) == {20: "w0"}
    assert placed(assign(policy, [held(21, 100, since_s=10.004)], [worker(0)], now_s=10.004)) == {21: "w0"}


def test_the_first_in_order_is_not_passed_by_for_ever_where_kv_space_is_short():
    busy = {"booked_requests": 8, "decoding": 8, "decode_ms": 8.0, "pass_ends_s": 10.005, "unused_blocks": 0}
    policy, big = late(), held(1, 1600, since_s=1.0)
    assert placed(assign(policy, [big], [worker(0, **busy, free_blocks=50)])) == {}
    assert placed(assign(policy, [big, held(2, 16)], [worker(0, **busy, free_blocks=90)])) == {}
    assert placed(assign(policy, [big, held(2, 16)], [worker(0, **busy, free_blocks=120)])) == {1: "w0"}


def test_nothing_is_planned_while_nobody_can_begin():
    asked = []

    def find():
        asked.append(1)
        return {}

    request = Request(RequestId(1), array("i", [1]) * 100, SamplingParams(50))
    waiting = HeldRequest(request, Role.AGG, 10.0, find)
    workers = [worker(slot, is_prefilling=True, pass_ends_s=10.1 + slot) for slot in range(3)]
    plan = assign(late(), [waiting], workers)
    assert (placed(plan), asked) == ({}, []) and plan.again_at_s == pytest.approx(10.09)


@st.composite
def situations(draw):
    views = []
    for slot in range(draw(st.integers(1, 5))):
        booked = draw(st.integers(0, 64))
        views.append(
            worker(
                slot,
                booked_requests=booked,
                decoding=draw(st.integers(0, booked)),
                context_tokens=draw(st.integers(0, 60_000)),
                pass_ends_s=draw(st.floats(9.9, 10.3)),
                is_prefilling=draw(st.booleans()),
                queued_tokens=(queued := draw(st.integers(0, 3000))),
                queued_prompts=draw(st.integers(1, 5)) if queued else 0,
                unused_blocks=draw(st.integers(0, 2000)),
                free_blocks=draw(st.integers(-100, 2000)),
                eviction_loss=draw(st.floats(0, 1)),
                decode_ms=draw(st.floats(0, 100)),
                decode_slope_ms=draw(st.floats(0, 100)),
            )
        )
    sizes = draw(st.lists(st.integers(1, 6000), max_size=40))
    waiting = []
    for number, tokens in enumerate(sizes, 1):
        most = tokens // BLOCK
        overlaps = {view.slot: draw(st.integers(1, most)) for view in views if most and draw(st.booleans())}
        waiting.append(held(number, tokens, overlaps, since_s=draw(st.floats(0, 10))))
    return waiting, views


@settings(deadline=None)
@given(situations(), st.booleans())
def test_whatever_the_situation_the_answer_is_a_valid_plan(situation, holds):
    waiting, views = situation
    policy = KVPolicy(KVOptions(), holds)
    plan = assign(policy, waiting, views)
    ids = [assignment.request_id for assignment in plan.assignments]
    assert len(set(ids)) == len(ids) and set(ids) <= {one.request.id for one in waiting}
    given_to = Counter(assignment.worker_id for assignment in plan.assignments)
    assert all(given_to[view.worker_id] <= max(0, view.free_slots) for view in views)
    assert assign(KVPolicy(KVOptions(), holds), waiting, views) == plan
    if holds and len(ids) < len(waiting):
        assert plan.again_at_s is not None and plan.again_at_s > 10.0


def test_nobody_waits_for_a_full_worker_while_another_one_is_idle():
    full = worker(0, booked_requests=64, decoding=64, decode_ms=200.0, pass_ends_s=10.005)
    assert placed(assign(late(), [held(1, 1000, {0: 60})], [full, worker(1)])) == {1: "w1"}


def test_with_many_workers_fewer_requests_are_planned_at_once():
    asked = []

    def waiting(number):
        request = Request(RequestId(number), array("i", [1]) * 100, SamplingParams(50))
        return HeldRequest(request, Role.AGG, 9.9, lambda: asked.append(number) or {})

    assign(late(), [waiting(number) for number in range(200)], [worker(slot) for slot in range(64)])
    assert len(asked) == 512 // 64


def test_what_arrives_at_once_is_sent_window_by_window():
    policy = KVPolicy(KVOptions(window=4), holds=False)
    plan = assign(policy, [held(number, 10) for number in range(6)], [worker(0)])
    assert len(plan.assignments) == 4 and plan.again_at_s == 10.0
    assert assign(policy, [held(number, 10) for number in range(4)], [worker(0)]).again_at_s is None
