"""One worker in virtual time: the simulated engine's scheduler, and when its passes begin and end.

As a real engine, it begins a pass as soon as there is work and the last pass is over, before anybody could react to
what that one reported. A pass is scheduled when it begins and reported when it ends.

Most passes do nothing but decode, and nobody has to see each of them. They are planned ahead, up to the first one that
ends a request or changes a block, and stay planned until one of three things happens: the plan is over; somebody wants
to see the worker (`settle`), so that those that have ended are reported, as one; or something is sent to it, so that
the pass under way is the last of the plan.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

from trtserve.plugins.api import BlockHash, Request, RequestId, Role, StepOutputs, TokenIds, WorkerId
from trtserve.plugins.engines.sim.scheduler import Scheduler

_IDLE_S = 1e-6
"""An idle worker begins so long after the first request came, so that all requests of one instant are in its pass."""

_MOST_DECODES = 256
"""Passes planned ahead; planning more is wasted where requests come often."""

Report: TypeAlias = Callable[[WorkerId, StepOutputs, float], None]
"""(worker, what one pass or several decodes gave, when the last of them ended, seconds)."""


class VirtualWorker:
    """Lives on a `VirtualTimeLoop`. Reports in the order of time; never from within `submit` or `cancel`."""

    def __init__(
        self, worker_id: WorkerId, role: Role, scheduler: Scheduler, loop: asyncio.AbstractEventLoop, report: Report
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self._scheduler = scheduler
        self._loop = loop
        self._report = report
        self._timer: asyncio.TimerHandle | None = None  # end of the pass or plan under way, or a begin; None: idle
        self._ends_s = 0.0  # when the pass or plan under way ends
        self._under_way: StepOutputs | None = None  # what the pass under way will give
        self._decodes_end_s: list[float] = []  # or: when each planned decode ends
        self._num_settled = 0  # of those: have ended and were reported

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRefused."""
        self._cut_plan()
        self._scheduler.add(request)
        self._wake()

    def cancel(self, request_id: RequestId) -> None:
        """End a request; the next pass reports it. Unknown ids are ignored."""
        self._cut_plan()
        self._scheduler.abort(request_id)
        if self._scheduler.has_work():
            self._wake()

    def stored_blocks(self, hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks are in the prefix cache."""
        return len(self._scheduler.pool.match(hashes, len(hashes)))

    def store(self, hashes: Sequence[BlockHash], tokens: TokenIds) -> None:
        """Blocks of a prompt's beginning that another worker computed become reusable, as far as there is room."""
        self._cut_plan()
        self._scheduler.pool.take_in(hashes, tokens)
        if self._scheduler.has_work():
            self._wake()

    def settle(self) -> None:
        """Report the planned decodes that have ended by now. The plan's last one has a timer of its own."""
        ends_s = self._decodes_end_s
        if ends_s:
            over = bisect_right(ends_s, self._loop.time(), self._num_settled, len(ends_s) - 1)
            self._run_decodes(over)

    def _cut_plan(self) -> None:
        """Something changes what the planned decodes would be, but not the one that has begun."""
        self.settle()
        if self._decodes_end_s:
            self._ends_s = self._decodes_end_s[self._num_settled]
            self._under_way = self._scheduler.run_decodes(1)
            self._decodes_end_s = []
            self._set_timer()

    def _run_decodes(self, over: int) -> None:
        """Run and report the planned decodes before number `over`."""
        count = over - self._num_settled
        if count:
            self._num_settled = over
            self._report(self.worker_id, self._scheduler.run_decodes(count), self._decodes_end_s[over - 1])

    def _wake(self) -> None:
        if self._timer is None:
            begin_s = self._loop.time() + _IDLE_S
            self._timer = self._loop.call_at(begin_s, self._begin, begin_s)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._ends_s, self._end)

    def _begin(self, now_s: float) -> None:
        """Begin the next pass, or several decodes, if there is work."""
        scheduler = self._scheduler
        self._timer = None
        while scheduler.has_work():
            durations_s = scheduler.plan_decodes(_MOST_DECODES)
            if durations_s:
                self._decodes_end_s = list(accumulate(durations_s, initial=now_s))[1:]
                self._num_settled = 0
                self._ends_s = self._decodes_end_s[-1]
                self._set_timer()
                return
            step = scheduler.run_pass()
            if step.stats is not None:
                self._under_way, self._ends_s = step, now_s + step.stats.duration_s
                self._set_timer()
                return
            self._report(self.worker_id, step, now_s)

    def _end(self) -> None:
        """The pass or plan under way is over."""
        now_s, step = self._ends_s, self._under_way
        if step is not None:
            self._under_way = None
            self._report(self.worker_id, step, now_s)
        else:
            self._run_decodes(len(self._decodes_end_s))
            self._decodes_end_s = []
        self._begin(now_s)
