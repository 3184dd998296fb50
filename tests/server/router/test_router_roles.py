"""Workers that are drained and change their role, as the router sees it."""

import asyncio

import pytest

from tests.server.router.routers import a_request, add, make_router, turn
from trtserve.plugins.api import Role, WorkerId
from trtserve.server.errors import Overloaded

A, B = WorkerId("a"), WorkerId("b")


async def test_a_worker_that_drains_gets_nothing_until_it_may_again():
    router = make_router()
    add(router, "a", slots=9, role=Role.PREFILL)
    add(router, "b", slots=9, role=Role.PREFILL)
    router.drain(A, True)
    placed = [await router.place(a_request(number), Role.PREFILL) for number in range(4)]
    assert {booking.worker_id for booking in placed} == {"b"}
    router.drain(A, False)
    with await router.place(a_request(9), Role.PREFILL) as booking:
        assert booking.worker_id == "a"


async def test_a_relabelled_worker_serves_its_new_role_and_keeps_its_blocks():
    router = make_router()
    add(router, "a", role=Role.PREFILL)
    add(router, "b", role=Role.PREFILL)
    router.events(A, 0, [("stored", (1, 2, 3))])
    router.drain(A, True)
    router.relabel(A, Role.DECODE)
    assert router.core.indexed(A)[0] == 3
    for role, worker in [(Role.DECODE, "a"), (Role.PREFILL, "b")]:
        with await router.place(a_request(1), role) as booking:
            assert booking.worker_id == worker


async def test_who_waits_for_a_role_without_workers_is_told_so():
    router = make_router()
    add(router, "a", role=Role.PREFILL, slots=1)
    running = await router.place(a_request(1), Role.PREFILL)
    waiting = asyncio.create_task(router.place(a_request(2), Role.PREFILL))
    await turn()
    router.drain(A, True)
    running.close()
    await turn()
    assert not waiting.done()
    router.relabel(A, Role.DECODE)
    with pytest.raises(Overloaded, match="no prefill worker is ready"):
        await waiting
    assert (router.num_held, router.held_tokens) == (0, 0)


async def test_a_cancellation_stays_one_where_the_role_has_gone_in_the_same_turn():
    router = make_router()
    add(router, "a", role=Role.PREFILL, slots=1)
    with await router.place(a_request(1), Role.PREFILL):
        waiting = asyncio.create_task(router.place(a_request(2), Role.PREFILL))
        await turn()
        router.drain(A, True)
    router.relabel(A, Role.DECODE)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (router.num_held, router.held_tokens) == (0, 0)
