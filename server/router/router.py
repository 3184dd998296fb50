"""Which worker takes a request, and when: the queue of held requests, the exact load, and the policy that chooses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Self

from trtserve.plugins.api import (
    EngineInfo,
    HeldRequest,
    Request,
    RequestId,
    Role,
    RoutingPolicy,
    WorkerId,
    WorkerLoad,
    WorkerView,
)
from trtserve.server.errors import Overloaded
from trtserve.server.metrics import Metrics

logger = logging.getLogger(__name__)

_WINDOW = 256
"""So many of the oldest held requests a policy looks at, which bounds the time of one decision."""

_NO_WORKER_RETRY_S = 5.0
_QUEUE_FULL_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many requests, and how many prompt tokens in all, may wait in the server."""

    requests: int
    tokens: int


@dataclass(slots=True)
class _Worker:
    """A ready worker's load, kept exact by bookings."""

    worker_id: WorkerId
    role: Role
    info: EngineInfo
    read_load: Callable[[], WorkerLoad]
    booked_requests: int = 0
    booked_tokens: int = 0

    def view(self) -> WorkerView:
        load = self.read_load()
        return WorkerView(self.worker_id, self.role, self.info, load, self.booked_requests, self.booked_tokens)


class Booking:
    """The Placement that `place` returns. Leaving the `with` block unbooks, exactly once."""

    __slots__ = ("_router", "_tokens", "_worker", "worker_id")

    def __init__(self, router: Router, worker: _Worker, tokens: int) -> None:
        self._router = router
        self._worker: _Worker | None = worker
        self._tokens = tokens
        self.worker_id = worker.worker_id
        worker.booked_requests += 1
        worker.booked_tokens += tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.booked_requests -= 1
            worker.booked_tokens -= self._tokens
            self._router.plan(worker.role)


@dataclass(slots=True)
class _Held:
    """A request in the queue and the one who waits for its booking."""

    waiting: HeldRequest
    placed: asyncio.Future[Booking]


class Router:
    """Holds requests until the policy finds a worker with room. Lives on the event loop; never awaits a worker."""

    def __init__(self, policy: RoutingPolicy, limits: QueueLimits, metrics: Metrics) -> None:
        self._policy = policy
        self._limits = limits
        self._metrics = metrics
        self._workers: dict[WorkerId, _Worker] = {}
        self._held: OrderedDict[RequestId, _Held] = OrderedDict()
        self.held_tokens = 0

    # -------------------------------------------------------------- workers come and go

    def add_worker(
        self, worker_id: WorkerId, role: Role, info: EngineInfo, read_load: Callable[[], WorkerLoad]
    ) -> None:
        """`read_load` gives the load as the worker last reported it."""
        self._workers[worker_id] = _Worker(worker_id, role, info, read_load)
        self.plan(role)

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its bookings end by themselves as its requests fail. Held requests wait on; if it was the last worker of
        its role they wait for its restart, until their own deadline."""
        self._workers.pop(worker_id, None)

    # -------------------------------------------------------------- requests

    @property
    def num_held(self) -> int:
        return len(self._held)

    def booked(self, worker_id: WorkerId) -> tuple[int, int]:
        """(requests, tokens) booked on a worker; none on one that is not ready."""
        worker = self._workers.get(worker_id)
        return (worker.booked_requests, worker.booked_tokens) if worker is not None else (0, 0)

    def infos(self) -> list[EngineInfo]:
        """What the ready workers can do."""
        return [worker.info for worker in self._workers.values()]

    async def place(self, request: Request, role: Role) -> Booking:
        """As Cluster.place. Suspends only while no worker has room."""
        if not any(worker.role is role for worker in self._workers.values()):
            self._metrics.rejections.labels("no_worker").inc()
            raise Overloaded(f"no {role} worker is ready", code="no_worker", retry_after_s=_NO_WORKER_RETRY_S)
        waiting = HeldRequest(request, role, time.monotonic())
        if not self._held:
            booking = self._book_at_once(waiting)
            if booking is not None:
                return booking
        held = _Held(waiting, asyncio.get_running_loop().create_future())
        self._hold(held)
        self.plan(role)
        if held.placed.done():
            return held.placed.result()
        self._check_room(held)
        try:
            return await held.placed
        except asyncio.CancelledError:
            # Cancelled in the same moment as placed: the booking has no owner any more.
            if held.placed.done() and not held.placed.cancelled():
                held.placed.result().close()
            raise
        finally:
            self._let_go(request.id)

    def _book_at_once(self, waiting: HeldRequest) -> Booking | None:
        """The usual case, without the queue: nobody waits, and the policy finds a worker with room."""
        views = self._views(waiting.role)
        if any(view.free_slots > 0 for view in views):
            for _, worker_id in self._policy.assign((waiting,), views, waiting.held_since_s):
                return self._book(waiting.request, worker_id)
        return None

    def _check_room(self, held: _Held) -> None:
        """The queue includes `held`; if that is one too many, it goes."""
        if len(self._held) <= self._limits.requests and self.held_tokens <= self._limits.tokens:
            return
        requests, tokens = len(self._held) - 1, self.held_tokens - len(held.waiting.request.prompt)
        self._let_go(held.waiting.request.id)
        self._metrics.rejections.labels("queue_full").inc()
        raise Overloaded(
            f"the server is full: {requests} requests with {tokens} prompt tokens are waiting "
            f"(limits {self._limits.requests} and {self._limits.tokens}); try again later",
            code="queue_full",
            retry_after_s=_QUEUE_FULL_RETRY_S,
        )

    def _hold(self, held: _Held) -> None:
        self._held[held.waiting.request.id] = held
        self.held_tokens += len(held.waiting.request.prompt)

    def _let_go(self, request_id: RequestId) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            self.held_tokens -= len(held.waiting.request.prompt)

    def plan(self, role: Role) -> None:
        """Ask the policy who goes where now, and book it."""
        # Once more where the policy saw a full window and found room for some of it: there may be more of both.
        while self._held and self._plan_window(role) == _WINDOW:
            pass

    def _plan_window(self, role: Role) -> int:
        """One decision over the oldest held requests; returns how many were looked at, 0 if nothing was placed."""
        in_order = (held.waiting for held in self._held.values() if held.waiting.role is role)
        waiting = list(islice(in_order, _WINDOW))
        views = self._views(role)
        if not waiting or not views or not any(view.free_slots > 0 for view in views):
            return 0
        try:
            assignments = self._policy.assign(waiting, views, time.monotonic())
        except Exception:
            # A plugin's defect must not hit whoever caused this decision by ending. The held requests wait on, for the
            # next decision or their own deadline.
            logger.exception("the routing policy failed")
            return 0
        for request_id, worker_id in assignments:
            held = self._held[request_id]
            self._let_go(request_id)
            if not held.placed.done():
                held.placed.set_result(self._book(held.waiting.request, worker_id))
        return len(waiting) if assignments else 0

    def _views(self, role: Role) -> list[WorkerView]:
        return [worker.view() for worker in self._workers.values() if worker.role is role]

    def _book(self, request: Request, worker_id: WorkerId) -> Booking:
        return Booking(self, self._workers[worker_id], len(request.prompt) + request.sampling.max_tokens)
