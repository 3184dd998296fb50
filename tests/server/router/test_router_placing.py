"""Whatever comes, leaves and breaks, in any order: what is booked and held is what lives."""

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from tests.server.router.routers import a_request, add, make_router
from trtserve.plugins.api import Role, WorkerId


class Placing(RuleBasedStateMachine):
    """Requests come, are cancelled at any moment and end, while workers come and go."""

    live = Bundle("live")

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.router = make_router(policy="round_robin", requests=4, tokens=60)
        self.slots = {}
        self.generation = {}
        self.tasks = {}
        self.requests = {}
        self.bookings = {}  # request number -> (booking, worker name, the worker's generation)
        self.number = 0

    def settle(self, turns=6):
        async def run():
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(run())
        for number, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[number]
                if not task.cancelled() and task.exception() is None:
                    booking = task.result()
                    self.bookings[number] = (booking, booking.worker_id, self.generation[booking.worker_id])

    @rule(target=live, sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4))
    def place(self, sizes):
        numbers = []
        for num_tokens, max_tokens in sizes:
            self.number += 1
            self.requests[self.number] = a_request(self.number, num_tokens, max_tokens)
            work = self.router.place(self.requests[self.number], Role.AGG)
            self.tasks[self.number] = self.loop.create_task(work)
            numbers.append(self.number)
        return multiple(*numbers)

    @rule(number=consumes(live), turns=st.integers(0, 3))
    def leave(self, number, turns):
        """Cancel while waiting, or end while booked; some turns later, or in the same."""
        self.settle(turns)
        self.end(number)

    @precondition(lambda self: self.bookings and self.tasks)
    @rule(data=st.data())
    def leave_together(self, data):
        """The end of one books for the first that waits, whose task has not heard of it when it is cancelled."""
        self.end(data.draw(st.sampled_from(sorted(self.bookings))), min(self.tasks), plans_at_once=True)

    def end(self, *numbers, plans_at_once=False):
        async def run():
            for number in numbers:
                if number in self.tasks:
                    self.tasks[number].cancel()
                elif number in self.bookings:
                    booking = self.bookings.pop(number)[0]
                    booking.close()
                    booking.close()  # as a `with` block may, after someone closed it inside
                    if plans_at_once:  # as where something else of this turn asks for a plan
                        self.router.plan(Role.AGG)

        self.loop.run_until_complete(run())

    @rule(name=st.sampled_from("abc"), slots=st.integers(1, 3))
    def worker_comes(self, name, slots):
        if name not in self.slots:
            self.settle()
            self.slots[name] = slots
            self.generation[name] = self.generation.get(name, 0) + 1
            add(self.router, name, slots)

    @rule(name=st.sampled_from("abc"))
    def worker_goes(self, name):
        self.settle()
        if self.slots.pop(name, None) is not None:
            self.router.remove_worker(WorkerId(name))

    @rule()
    def time_passes(self):
        self.settle()

    @invariant()
    def booked_is_the_sum_of_live_bookings(self):
        self.settle()
        for name, slots in self.slots.items():
            mine = [
                self.requests[number]
                for number, (_, worker, generation) in self.bookings.items()
                if (worker, generation) == (name, self.generation[name])
            ]
            tokens = sum(len(request.prompt) + request.sampling.max_tokens for request in mine)
            assert self.router.booked(WorkerId(name)) == (len(mine), tokens)
            assert len(mine) <= slots

    @invariant()
    def held_is_what_waits(self):
        self.settle()
        waiting = [self.requests[number] for number in self.tasks]
        assert self.router.num_held == len(waiting) <= 4
        assert self.router.held_tokens == sum(len(request.prompt) for request in waiting) <= 60

    @invariant()
    def nobody_waits_beside_room(self):
        self.settle()
        if self.tasks:
            assert all(self.router.booked(WorkerId(name))[0] == slots for name, slots in self.slots.items())

    def teardown(self):
        for task in self.tasks.values():
            task.cancel()
        self.settle()
        for number in list(self.bookings):
            self.bookings.pop(number)[0].close()
        self.booked_is_the_sum_of_live_bookings()
        assert self.router.num_held == self.router.held_tokens == 0
        self.loop.close()


TestPlacing = Placing.TestCase
TestPlacing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
