"""Routing on the event loop: requests wait here for their booking, timers ask again, and the queue is bounded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

from trtserve.plugins.api import EngineInfo, PassStats, Prediction, Request, RequestId, Role, WorkerId, WorkerLoad
from trtserve.server.errors import Overloaded
from trtserve.server.metrics import Metrics
from trtserve.server.router.bookings import Booking
from trtserve.server.router.core import IndexCheck, RoutingCore
from trtserve.server.router.description import describe
from trtserve.server.router.feed import Change

logger = logging.getLogger(__name__)

_NO_WORKER_RETRY_S = 5.0
_QUEUE_FULL_RETRY_S = 1.0
_AFTER_FAILURE_S = 1.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many requests, and how many prompt tokens in all, may wait in the server."""

    requests: int
    tokens: int


class ServerBooking:
    """The Placement that `place` returns. Leaving the `with` block unbooks, exactly once."""

    __slots__ = ("_router", "booking", "worker_id")

    def __init__(self, router: Router, booking: Booking) -> None:
        self._router: Router | None = router
        self.booking = booking
        self.worker_id = booking.worker_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        router, self._router = self._router, None
        if router is not None:
            router.unbook(self.booking)


class Router:
    """Holds requests until the policy finds a worker for them. Lives on the event loop; never awaits a worker."""

    def __init__(
        self,
        core: RoutingCore,
        limits: QueueLimits,
        metrics: Metrics,
        policy_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self._limits = limits
        self._metrics = metrics
        self._policy_name = policy_name
        self._decisions = metrics.decisions.labels(policy_name)
        self._clock = clock
        self._waiting: dict[tuple[Role, RequestId], asyncio.Future[ServerBooking]] = {}
        self._checks: dict[WorkerId, list[asyncio.Future[IndexCheck | None]]] = {}
        self._timers: dict[Role, asyncio.TimerHandle] = {}
        self._planned: set[Role] = set()  # at the end of this turn of the loop
        self._arrived: set[Role] = set()  # roles for which this turn of the loop has brought a request already

    # -------------------------------------------------------------- workers come and go

    def add_worker(self, worker_id: WorkerId, role: Role, info: EngineInfo) -> None:
        """A worker is ready. `plan` lets it take what waits, once all is told that is known of it."""
        self.core.add_worker(worker_id, role, info)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its bookings end by themselves as its requests fail. Held requests wait on; if it was the last worker of
        its role they wait for its restart, until their own deadline. It answers no `next_check` any more."""
        self.core.remove_worker(worker_id)
        for waiting in self._checks.pop(worker_id, ()):
            if not waiting.done():
                waiting.set_result(None)

    def drain(self, worker_id: WorkerId, is_draining: bool) -> None:
        """Place nothing more on a worker, or again."""
        self.core.drain(worker_id, is_draining)
        worker = self.core.workers.get(worker_id)
        if worker is not None and not is_draining:
            self.plan(worker.counts.role)

    def relabel(self, worker_id: WorkerId, role: Role) -> None:
        """A drained worker has another role from now on. If it was the last of its role, those who wait for that role
        are told so: nobody will come back to them."""
        former = self.core.workers[worker_id].counts.role
        self.core.relabel(worker_id, role)
        if not self.core.has_role(former):
            for (wanted, _), placed in list(self._waiting.items()):
                if wanted is former and not placed.done():
                    placed.set_exception(_no_worker(former))

    # -------------------------------------------------------------- requests

    @property
    def num_held(self) -> int:
        return self.core.num_held

    @property
    def held_tokens(self) -> int:
        return self.core.held_tokens

    def booked(self, worker_id: WorkerId) -> tuple[int, int]:
        """(requests, tokens) booked on a worker; none on one that is not ready."""
        worker = self.core.workers.get(worker_id)
        return (worker.counts.booked_requests, worker.counts.booked_tokens) if worker is not None else (0, 0)

    def infos(self) -> list[tuple[Role, EngineInfo]]:
        """What the ready workers are and can do."""
        return [(worker.counts.role, worker.counts.info) for worker in self.core.workers.values()]

    def describe(self) -> dict[str, Any]:
        """The state in detail, JSON-able."""
        return describe(self.core, self._policy_name, self._clock())

    def predict(self, request: Request, role: Role) -> Prediction | None:
        """As Cluster.predict."""
        return self.core.predict(request, role, self._clock())

    async def place(self, request: Request, role: Role, moves_kv: bool = False) -> ServerBooking:
        """As Cluster.place. Suspends while the request is held, at most until the end of this turn of the loop if the
        policy holds none back."""
        core = self.core
        if not core.has_role(role):
            self._metrics.rejections.labels("no_worker").inc()
            raise _no_worker(role)
        placed: asyncio.Future[ServerBooking] = asyncio.get_running_loop().create_future()
        core.hold(request, role, self._clock(), moves_kv)
        self._waiting[role, request.id] = placed
        try:
            self._plan_arrival(role)
            if not placed.done() and self._is_overfull():
                self.plan(role)
                if not placed.done():
                    self._refuse(request)
            return await placed
        except asyncio.CancelledError:
            # Cancelled in the same moment as placed: the booking has no owner any more.
            if placed.done() and not placed.cancelled() and placed.exception() is None:
                placed.result().close()
            raise
        finally:
            self._waiting.pop((role, request.id), None)
            core.let_go(request.id, role)

    def unbook(self, booking: Booking) -> None:
        """A booking is over: its place is free for whoever waits."""
        role = booking.worker.counts.role
        self.core.ended(booking, self._clock())
        self.plan_soon(role)

    def _is_overfull(self) -> bool:
        core, limits = self.core, self._limits
        return core.num_held > limits.requests or core.held_tokens > limits.tokens

    def _refuse(self, request: Request) -> NoReturn:
        """The queue includes `request`, which is one too many."""
        core, limits = self.core, self._limits
        requests, tokens = core.num_held - 1, core.held_tokens - len(request.prompt)
        self._metrics.rejections.labels("queue_full").inc()
        raise Overloaded(
            f"the server is full: {requests} requests with {tokens} prompt tokens are waiting "
            f"(limits {limits.requests} and {limits.tokens}); try again later",
            code="queue_full",
            retry_after_s=_QUEUE_FULL_RETRY_S,
        )

    # -------------------------------------------------------------- what workers report

    def events(self, worker_id: WorkerId, first_event: int, changes: Sequence[Change]) -> None:
        """KV events of one step, before anything else of it."""
        self.core.events(worker_id, first_event, changes, self._clock())

    def prompt_done(self, worker_id: WorkerId, request_id: RequestId, cached_tokens: int) -> None:
        """A request got its first token."""
        booking = self.core.prompt_done(worker_id, request_id, cached_tokens)
        if booking is not None:
            self._metrics.prefix_error.observe(booking.predicted_cached_tokens - cached_tokens)

    def snapshot(self, worker_id: WorkerId, next_event: int, hashes: Sequence[int]) -> None:
        """A worker's whole set of blocks."""
        check = self.core.snapshot(worker_id, next_event, hashes)
        for waiting in self._checks.pop(worker_id, ()):
            if not waiting.done():
                waiting.set_result(check)

    def next_check(self, worker_id: WorkerId) -> asyncio.Future[IndexCheck | None]:
        """How the index will differ from the set that the worker sends next. Call it before the worker is asked, whose
        answer may be read before any other task runs; cancel the future when it is not waited for any more."""
        waiting: asyncio.Future[IndexCheck | None] = asyncio.get_running_loop().create_future()
        waiting.add_done_callback(partial(self._forget_check, worker_id))
        self._checks.setdefault(worker_id, []).append(waiting)
        return waiting

    def _forget_check(self, worker_id: WorkerId, waiting: asyncio.Future[IndexCheck | None]) -> None:
        others = self._checks.get(worker_id, [])
        if waiting in others:
            others.remove(waiting)

    def learn(self, worker_id: WorkerId, stats: PassStats) -> None:
        """A pass of a ready worker's warm-up."""
        self.core.learn(worker_id, stats)

    def pass_ended(
        self,
        worker_id: WorkerId,
        stats: PassStats | None,
        load: WorkerLoad,
        tokens: int,
        rows: int,
        next_event: int | None = None,
    ) -> None:
        """As `RoutingCore.pass_ended`."""
        role = self.core.pass_ended(worker_id, stats, load, tokens, rows, self._clock(), next_event)
        if self._waiting and role is not None and (rows if stats is None else stats.prefill_tokens):
            self.plan_soon(role)

    # -------------------------------------------------------------- the decision

    def _plan_arrival(self, role: Role) -> None:
        """The first request of a turn of the loop is planned at once, the others of the same turn together."""
        if role in self._arrived:
            self.plan_soon(role)
        else:
            self._arrived.add(role)
            asyncio.get_running_loop().call_soon(self._arrived.discard, role)
            self.plan(role)

    def plan_soon(self, role: Role) -> None:
        """`plan` once this turn of the loop is over: what else it brings, dozens of passes of a busy worker say, costs
        no plan of its own and is known by then."""
        if self._waiting and role not in self._planned:
            self._planned.add(role)
            asyncio.get_running_loop().call_soon(self._plan_now, role)

    def _plan_now(self, role: Role) -> None:
        self._planned.discard(role)
        self.plan(role)

    def plan(self, role: Role) -> None:
        """Ask the policy who goes where now, book it, and wake those who waited for it."""
        if not self._waiting:
            return
        now_s, started_s = self._clock(), time.perf_counter()
        try:
            bookings = self.core.plan(role, now_s)
            again_at_s = self.core.again_at_s(role)
        except Exception:
            # A plugin's defect must not hit whoever caused this decision by ending. The held requests wait on, for the
            # next decision or their own deadline.
            logger.exception("the routing policy failed")
            bookings, again_at_s = [], now_s + _AFTER_FAILURE_S
        self._metrics.decision_seconds.observe(time.perf_counter() - started_s)
        for booking in bookings:
            self._wake(booking)
        self._set_timer(role, again_at_s, now_s)

    def _wake(self, booking: Booking) -> None:
        self._decisions.inc()
        self._metrics.held_seconds.observe(booking.held_s)
        placed = self._waiting.pop((booking.worker.counts.role, booking.request.id), None)
        owned = ServerBooking(self, booking)
        if placed is None or placed.done():
            # Cancelled, and its task has not run since: nobody will give the booking back.
            asyncio.get_running_loop().call_soon(owned.close)
        else:
            placed.set_result(owned)

    def _set_timer(self, role: Role, again_at_s: float | None, now_s: float) -> None:
        timer = self._timers.pop(role, None)
        if timer is not None:
            timer.cancel()
        if again_at_s is not None:
            loop = asyncio.get_running_loop()
            self._timers[role] = loop.call_later(max(0.0, again_at_s - now_s), self._on_timer, role)

    def _on_timer(self, role: Role) -> None:
        self._timers.pop(role, None)
        self.plan(role)


def _no_worker(role: Role) -> Overloaded:
    return Overloaded(f"no {role} worker is ready", code="no_worker", retry_after_s=_NO_WORKER_RETRY_S)
