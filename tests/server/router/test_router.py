"""Placing requests: exact bookings, a bounded queue, and nothing lost whenever one changes its mind."""

import asyncio

import pytest

from tests.server.router.routers import a_request, add, make_router, router_with, turn
from trtserve.plugins.api import Role, WorkerId
from trtserve.plugins.routing_api import Assignment, Plan
from trtserve.server.errors import Overloaded


def rejections(router, reason):
    return router._metrics.registry.get_sample_value("trtserve_rejections_total", {"reason": reason})


async def test_a_request_is_booked_before_place_returns():
    router = make_router()
    add(router, "a", slots=2)
    with await router.place(a_request(1), Role.AGG) as booking:
        assert booking.worker_id == "a"
        assert router.booked(WorkerId("a")) == (1, 15)
        assert router.num_held == router.held_tokens == 0
    assert router.booked(WorkerId("a")) == (0, 0)


async def test_two_in_the_same_turn_see_each_other():
    router = make_router()
    add(router, "a", slots=5)
    add(router, "b", slots=5)
    bookings = await asyncio.gather(*(router.place(a_request(number), Role.AGG) for number in range(4)))
    assert sorted(booking.worker_id for booking in bookings) == ["a", "a", "b", "b"]


class _Watched:
    """How many were held at each decision; places all of them."""

    uses_prefixes = False

    def __init__(self):
        self.asked = []

    def assign(self, held, state):
        self.asked.append(len(held))
        return Plan([Assignment(waiting.request.id, state.workers[0].worker_id) for waiting in held])


async def test_the_first_request_of_a_turn_is_placed_at_once_and_the_others_together():
    router = router_with(policy := _Watched())
    add(router, "a", slots=20)
    for turns in (1, 2):
        await asyncio.gather(*(router.place(a_request(10 * turns + number), Role.AGG) for number in range(8)))
        assert policy.asked == [1, 7] * turns


async def test_more_requests_in_a_turn_than_the_queue_holds_are_placed_all_the_same():
    router = router_with(_Watched(), requests=2)
    add(router, "a", slots=20)
    bookings = await asyncio.gather(*(router.place(a_request(number), Role.AGG) for number in range(12)))
    assert len(bookings) == 12 and rejections(router, "queue_full") is None


async def test_leaving_twice_gives_back_once():
    router = make_router()
    add(router, "a", slots=3)
    keep = await router.place(a_request(1), Role.AGG)
    booking = await router.place(a_request(2), Role.AGG)
    for _ in range(3):
        booking.close()
    assert router.booked(WorkerId("a")) == (1, 15)
    keep.close()


async def test_a_request_waits_for_room_in_order():
    router = make_router()
    add(router, "a", slots=1)
    first = await router.place(a_request(1), Role.AGG)
    waiting = [asyncio.create_task(router.place(a_request(number), Role.AGG)) for number in (2, 3)]
    await turn()
    assert (router.num_held, router.held_tokens) == (2, 20)
    first.close()
    await turn()
    assert [task.done() for task in waiting] == [True, False]
    waiting[0].result().close()
    (await waiting[1]).close()
    assert (router.num_held, router.held_tokens) == (0, 0)


async def test_nobody_there_is_told_at_once():
    router = make_router()
    add(router, "p", role=Role.PREFILL)
    with pytest.raises(Overloaded, match="no agg worker is ready") as caught:
        await router.place(a_request(1), Role.AGG)
    assert caught.value.code == "no_worker" and router.num_held == 0
    assert rejections(router, "no_worker") == 1


@pytest.mark.parametrize(
    ("limits", "sizes", "fits"),
    [
        ({"requests": 2}, [1, 1, 1], 2),
        ({"tokens": 25}, [10, 10, 10], 2),
        ({"tokens": 20}, [10, 10, 1], 2),
        ({"requests": 0}, [1], 0),
        ({"tokens": 5}, [6], 0),
    ],
)
async def test_the_queue_is_bounded(limits, sizes, fits):
    router = make_router(**limits)
    add(router, "a", slots=1)
    blocker = await router.place(a_request(1), Role.AGG)
    tasks = [asyncio.create_task(router.place(a_request(i, size), Role.AGG)) for i, size in enumerate(sizes, 2)]
    await turn()
    assert [task.done() for task in tasks] == [place >= fits for place in range(len(tasks))]
    for task in tasks[fits:]:
        with pytest.raises(Overloaded, match="the server is full") as caught:
            task.result()
        assert caught.value.code == "queue_full"
    assert (router.num_held, router.held_tokens) == (fits, sum(sizes[:fits]))
    assert rejections(router, "queue_full") == len(sizes) - fits
    for task in tasks:
        task.cancel()
    await turn()
    assert (router.num_held, router.held_tokens) == (0, 0)
    blocker.close()


async def test_one_who_leaves_the_queue_leaves_nothing():
    router = make_router()
    add(router, "a", slots=1)
    blocker = await router.place(a_request(1), Role.AGG)
    task = asyncio.create_task(router.place(a_request(2), Role.AGG))
    await turn()
    task.cancel()
    await turn()
    assert task.cancelled() and (router.num_held, router.held_tokens) == (0, 0)
    blocker.close()
    assert router.booked(WorkerId("a")) == (0, 0)


async def test_one_who_leaves_in_the_moment_of_being_placed_leaves_nothing():
    router = make_router()
    add(router, "a", slots=1)
    blocker = await router.place(a_request(1), Role.AGG)
    task = asyncio.create_task(router.place(a_request(2), Role.AGG))
    await turn()
    blocker.close()
    router.plan(Role.AGG)  # books for the second one, whose task has not run yet
    assert router.booked(WorkerId("a")) == (1, 15)
    task.cancel()
    await turn()
    assert router.booked(WorkerId("a")) == (0, 0)


async def test_a_new_worker_takes_what_waits():
    router = make_router()
    add(router, "a", slots=1)
    blocker = await router.place(a_request(1), Role.AGG)
    task = asyncio.create_task(router.place(a_request(2), Role.AGG))
    await turn()
    add(router, "b", slots=1)
    assert (await task).worker_id == "b"
    task.result().close()
    blocker.close()


async def test_a_new_worker_takes_more_than_one_window():
    router = make_router(requests=2000, tokens=10**6)
    add(router, "a", slots=1)
    blocker = await router.place(a_request(0), Role.AGG)
    tasks = [asyncio.create_task(router.place(a_request(number), Role.AGG)) for number in range(1, 701)]
    await turn()
    add(router, "b", slots=600)
    assert (router.booked(WorkerId("b"))[0], router.num_held) == (600, 100)
    await turn()
    assert [task.done() for task in tasks] == [True] * 600 + [False] * 100
    blocker.close()
    for task in tasks:
        task.cancel() or task.result().close()
    await turn()
    assert router.num_held == 0


async def test_roles_wait_apart():
    router = make_router()
    add(router, "p", slots=1, role=Role.PREFILL)
    add(router, "d", slots=1, role=Role.DECODE)
    prefill = await router.place(a_request(1), Role.PREFILL)
    waiting = asyncio.create_task(router.place(a_request(2), Role.PREFILL))
    decode = await router.place(a_request(3), Role.DECODE)
    assert (prefill.worker_id, decode.worker_id) == ("p", "d")
    decode.close()
    await turn()
    assert not waiting.done()
    prefill.close()
    (await waiting).close()


async def test_held_requests_survive_a_restart_of_the_last_worker():
    router = make_router()
    add(router, "a", slots=1)
    lost = await router.place(a_request(1), Role.AGG)
    task = asyncio.create_task(router.place(a_request(2), Role.AGG))
    await turn()
    router.remove_worker(WorkerId("a"))
    lost.close()
    await turn()
    assert not task.done() and router.booked(WorkerId("a")) == (0, 0)
    add(router, "a", slots=1)
    (await task).close()


class _Moody:
    """A policy of somebody else, which fails while it is told to."""

    fails = False

    uses_prefixes = False

    def assign(self, held, state):
        if self.fails:
            raise RuntimeError("not now")
        worker = state.workers[0]
        return Plan([Assignment(waiting.request.id, worker.worker_id) for waiting in held[: worker.free_slots]])


async def test_a_policy_that_fails_hurts_neither_who_ends_nor_who_waits():
    policy = _Moody()
    router = router_with(policy)
    add(router, "a", slots=1)
    first = await router.place(a_request(1), Role.AGG)
    second = asyncio.create_task(router.place(a_request(2), Role.AGG))
    await turn()
    policy.fails = True
    first.close()
    await turn()
    assert not second.done() and router.num_held == 1
    policy.fails = False
    router.plan(Role.AGG)
    (await second).close()
    assert router.booked(WorkerId("a")) == (0, 0)
