"""Routing without a clock or an event loop: what is held, what is booked, what workers reported, and who goes where.

The server (`router.py`) drives it from asyncio and a replay drives it in virtual time, so both decide alike. Every call
takes the time; none waits. Reports of one engine step come in this order: `events`, `prompt_done` for each prompt that
the step completed, `pass_ended`; then the ends of requests.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from trtserve.plugins.api import EngineInfo, PassStats, Prediction, Request, RequestId, Role, WorkerId, WorkerLoad
from trtserve.plugins.routing_api import (
    Assignment,
    HeldRequest,
    PassTimes,
    Plan,
    RoutingPolicy,
    RoutingState,
    WorkerView,
)
from trtserve.server.router.bookings import Booking, Worker
from trtserve.server.router.feed import Change, EventFeed, RoutedBlocks
from trtserve.server.router.index import Overlaps, PrefixIndex
from trtserve.server.router.speeds import PassTimeModel
from trtserve.server.router.traffic import EvictionAge, Traffic
from trtserve.server.router.worker_load import Booked, TrackedLoad

logger = logging.getLogger(__name__)

WINDOW = 256
"""So many of the oldest held requests a policy looks at, which bounds the time of one decision."""

_MOST_RESERVED = 1024
"""Leading blocks of a prompt that are reserved: it takes a third of a microsecond each, on the event loop."""

_S_PER_HELD = 45e-6
_S_PER_PAIR = 20e-6
"""A policy that holds requests back is not asked anew before this time for each held request, and for each pair of held
request and worker, that it weighed has passed: ten times what weighing costs, or a little more, so that planning takes
a tenth of the time at most. Twice as long, and quick workers wait for requests; half as long costs more than it
brings."""

_LONGEST_REST_S = 0.01
"""A longer one would leave workers idle."""


@dataclass(frozen=True, slots=True)
class IndexCheck:
    """The index against what a worker says of itself."""

    was_known: bool  # False: the index had missed events and was waiting for this
    stored_blocks: int  # on the worker
    missing_blocks: int  # of those, not in the index
    extra_blocks: int  # in the index and not on the worker


class DecisionRecorder(Protocol):
    """Who wants to know on what grounds requests were placed."""

    def record(self, held: Sequence[HeldRequest], state: RoutingState, plan: Plan) -> None:
        """Called with a plan that assigns something, before it is booked. Must copy what it keeps."""


class RoutingCore:
    """One for all roles. Not thread-safe."""

    def __init__(
        self,
        policy: RoutingPolicy,
        traffic: Traffic | None = None,
        pinned_times: PassTimes | None = None,
        recorder: DecisionRecorder | None = None,
        resync: Callable[[WorkerId], None] = lambda worker_id: None,
    ) -> None:
        """`pinned_times` are used instead of what is learnt. `resync` is called when a worker's KV events have a gap,
        and its whole set is needed."""
        self.policy = policy
        self.index = PrefixIndex()
        self.traffic = traffic or Traffic()
        self.workers: dict[WorkerId, Worker] = {}
        self._infos: dict[EngineInfo, EngineInfo] = {}
        self._pinned_times = pinned_times
        self._recorder = recorder
        self._resync = resync
        self._pass_times: dict[Role, PassTimeModel] = {}
        # A request may be held for two roles at once, while its prefill is tried again.
        self._held: dict[Role, OrderedDict[RequestId, HeldRequest]] = {role: OrderedDict() for role in Role}
        self.held_tokens = 0
        self._again_at_s: dict[Role, float | None] = {}
        self._rest_until_s: dict[Role, float] = {}

    # -------------------------------------------------------------- workers come and go

    def add_worker(self, worker_id: WorkerId, role: Role, info: EngineInfo) -> None:
        """A worker is ready, with nothing booked and nothing stored; a former one of that id is removed."""
        self.remove_worker(worker_id)
        info = self._infos.setdefault(info, info)  # equal ones are one object: policies see at a glance what is alike
        slot = self.index.add_worker(info.num_blocks)
        model = self.pass_times(role)
        blocks = info.num_blocks
        view = WorkerView(worker_id, role, info, slot, model.times, unused_blocks=blocks, free_blocks=blocks)
        feed = routed = None
        if info.publishes_kv_events:
            feed = EventFeed(self.index, slot, lambda: self._resync(worker_id))
        elif info.caches_prefixes:
            routed = RoutedBlocks(self.index, slot, info.num_blocks)
        self.workers[worker_id] = Worker(TrackedLoad(view, model), feed, routed, EvictionAge(self.traffic))

    def remove_worker(self, worker_id: WorkerId) -> None:
        """Its blocks leave the index. Its bookings stay with whoever made them, who gives them back as ever."""
        worker = self.workers.pop(worker_id, None)
        if worker is not None:
            self.index.remove_worker(worker.counts.slot)

    def drain(self, worker_id: WorkerId, is_draining: bool) -> None:
        """Whether a worker is passed over by decisions from now on; what is booked on it goes on."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.is_draining = is_draining

    def relabel(self, worker_id: WorkerId, role: Role) -> None:
        """A worker on which nothing is booked has another role from now on. What it has stored stays in the index, and
        it takes requests again."""
        worker = self.workers[worker_id]
        assert not worker.counts.booked_requests, "drained before"
        worker.counts.role = role
        worker.tracked.pass_times = self.pass_times(role)
        worker.is_draining = False

    def pass_times(self, role: Role) -> PassTimeModel:
        """What is known of the speed of the workers of a role."""
        return self._pass_times.setdefault(role, PassTimeModel(self._pinned_times))

    def has_role(self, role: Role) -> bool:
        """Whether a worker of that role takes requests."""
        return bool(self.of_role(role))

    def roles(self) -> list[Role]:
        """Those of whose workers something is known."""
        return list(self._pass_times)

    def of_role(self, role: Role) -> list[Worker]:
        """Those that take requests."""
        return [worker for worker in self.workers.values() if worker.counts.role is role and not worker.is_draining]

    def indexed(self, worker_id: WorkerId) -> tuple[int, int]:
        """(blocks in the index, times that events were missed) of a worker; none of one that is not ready."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return 0, 0
        gaps = worker.feed.gaps + worker.feed.overflows if worker.feed is not None else 0
        return self.index.num_stored(worker.counts.slot), gaps

    # -------------------------------------------------------------- requests

    @property
    def num_held(self) -> int:
        return sum(map(len, self._held.values()))

    def hold(self, request: Request, role: Role, now_s: float, moves_kv: bool = False) -> None:
        """Put a request at the end of the queue. moves_kv: the KV of its prompt comes from another worker."""
        overlaps = Overlaps(self.index, request.block_hashes)
        self._held[role][request.id] = HeldRequest(request, role, now_s, overlaps, moves_kv)
        self.held_tokens += len(request.prompt)

    def let_go(self, request_id: RequestId, role: Role) -> None:
        """Take a request out of the queue of a role; nothing happens if it is not there."""
        held = self._held[role].pop(request_id, None)
        if held is not None:
            self.held_tokens -= len(held.request.prompt)

    def predict(self, request: Request, role: Role, now_s: float) -> Prediction | None:
        """What the worker of a role that could compute this prompt first would need for it; None if there is none."""
        overlaps = self.index.overlaps(request.block_hashes) if request.block_hashes else {}
        best: Prediction | None = None
        times = self.pass_times(role).times
        for worker in self.of_role(role):
            worker.tracked.observe(now_s)
            worker.tracked.use(times)
            view = worker.counts
            size = view.info.block_size
            cached = min(overlaps.get(view.slot, 0), (len(request.prompt) - 1) // size) * size
            wait_ms, compute_ms = worker.tracked.expected_ms(len(request.prompt) - cached, now_s)
            if best is None or wait_ms + compute_ms < best.wait_ms + best.compute_ms:
                best = Prediction(wait_ms, compute_ms, len(request.prompt) - cached, view.decoding)
        return best

    def again_at_s(self, role: Role) -> float | None:
        """When to plan again if nothing happens before; None: only when something happens, or nobody is held."""
        return self._again_at_s.get(role) if self._held[role] else None

    def plan(self, role: Role, now_s: float) -> list[Booking]:
        """Ask the policy who goes where now, and book it. Raises what the policy raises, and ValueError for a plan that
        cannot be; nothing is booked then."""
        bookings: list[Booking] = []
        self._again_at_s[role] = None
        # Once more where the policy saw a full window and found room for some of it: there may be more of both.
        while self._held[role]:
            try:
                if not self._plan_window(role, now_s, bookings):
                    break
            except Exception:
                if not bookings:
                    raise
                logger.exception("the routing policy failed after it had placed %d requests", len(bookings))
                break
        return bookings

    def ended(self, booking: Booking, now_s: float) -> None:
        """The booking's request is over, or its phase on that worker. Once for each booking."""
        worker, booked = booking.worker, booking.booked
        if booking.reservation is not None:
            self.index.unreserve(booking.reservation)
        if booked.is_prompt_done and worker.counts.role is not Role.PREFILL:
            self.traffic.ended(worker.tracked.generated_tokens(booked))
        worker.tracked.ended(booked)
        if worker.bookings.get(booking.request.id) is booking:
            del worker.bookings[booking.request.id]

    # -------------------------------------------------------------- what workers report

    def events(self, worker_id: WorkerId, first_event: int, changes: Sequence[Change], now_s: float) -> None:
        """KV events of one step; `first_event` numbers the first of them within the worker's incarnation."""
        worker = self.workers.get(worker_id)
        if worker is not None and worker.feed is not None:
            worker.feed.apply(first_event, changes, now_s)
            removed = [hashes for kind, hashes in changes if kind == "removed"]
            for hashes in removed:
                worker.eviction.removed(hashes, now_s)
            if removed:
                worker.counts.eviction_loss = worker.eviction.loss(self.traffic.estimates.block_life_s)

    def snapshot(self, worker_id: WorkerId, next_event: int, hashes: Sequence[int]) -> IndexCheck | None:
        """A worker's whole set of blocks, as `resync` asked for, after the events below `next_event`. Returns how the
        index differed from it, None for a worker without a part in the index."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.feed is None:
            return None
        stored, actual = self.index.stored(worker.counts.slot), set(hashes)
        check = IndexCheck(worker.feed.is_known, len(actual), len(actual - stored), len(stored - actual))
        worker.feed.snapshot(next_event, hashes)
        return check

    def learn(self, worker_id: WorkerId, stats: PassStats) -> None:
        """A pass that the worker ran before it was ready."""
        worker = self.workers[worker_id]
        worker.tracked.pass_times.observe(stats, worker.counts.kv_tokens)

    def prompt_done(self, worker_id: WorkerId, request_id: RequestId, cached_tokens: int) -> Booking | None:
        """A request got its first token. None where it is not booked there (any more)."""
        worker = self.workers.get(worker_id)
        booking = worker.bookings.get(request_id) if worker is not None else None
        if worker is None or booking is None:
            return None
        booking.cached_tokens = cached_tokens
        worker.tracked.prompt_done(booking.booked, cached_tokens)
        if worker.routed is not None:
            worker.routed.computed(booking.request.block_hashes[:_MOST_RESERVED])
        return booking

    def pass_ended(
        self,
        worker_id: WorkerId,
        stats: PassStats | None,
        load: WorkerLoad,
        tokens: int,
        rows: int,
        now_s: float,
        next_event: int | None = None,
    ) -> Role | None:
        """The rest of a step: `rows` sequences got `tokens` tokens in all. next_event: the number of the KV event to
        come, which shows whether some were lost; None where events come later than steps. Returns the worker's role."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return None
        feed = worker.feed
        if feed is not None and next_event is not None and (feed.next_event != next_event or not feed.is_known):
            feed.apply(next_event, (), now_s)
        tracked = worker.tracked
        view = tracked.counts
        if stats is not None and tracked.pass_times.wants(stats, now_s):
            tracked.pass_times.observe(stats, view.kv_tokens)
        tracked.pass_ended(stats, load, tokens, rows, now_s)
        # Each running sequence has one block that is not full yet, and so not stored.
        view.unused_blocks = max(0, view.info.num_blocks - self.index.num_stored(view.slot) - load.running)
        return view.role

    # -------------------------------------------------------------- the decision

    def _plan_window(self, role: Role, now_s: float, bookings: list[Booking]) -> bool:
        """One decision over the oldest held requests; whether another one may place more."""
        rest_until_s = self._rest_until_s.get(role, 0.0)
        if now_s < rest_until_s:
            self._again_at_s[role] = rest_until_s
            return False
        workers = self.of_role(role)
        if not any(worker.counts.free_slots > 0 for worker in workers):
            return False
        held = list(islice(self._held[role].values(), WINDOW))
        plan = self._ask(held, workers, now_s)
        _check(plan, held, workers)
        for assignment in plan.assignments:
            bookings.append(self._book(assignment, role, now_s))
        left = len(held) - len(plan.assignments)
        if left and plan.again_at_s is not None:
            rest_until_s = now_s + min(_LONGEST_REST_S, left * (_S_PER_HELD + len(workers) * _S_PER_PAIR))
            self._rest_until_s[role] = rest_until_s
            self._again_at_s[role] = max(plan.again_at_s, rest_until_s)
        return bool(plan.assignments) and len(held) == WINDOW

    def _ask(self, held: Sequence[HeldRequest], workers: Iterable[Worker], now_s: float) -> Plan:
        views = []
        estimates = self.traffic.estimates
        times = self.pass_times(held[0].role).times
        for worker in workers:
            worker.tracked.observe(now_s)
            worker.tracked.use(times)
            views.append(worker.tracked.view)
        state = RoutingState(now_s, views, estimates)
        plan = self.policy.assign(held, state)
        if self._recorder is not None and plan.assignments:
            self._recorder.record(held, state, plan)
        return plan

    def _book(self, assignment: Assignment, role: Role, now_s: float) -> Booking:
        worker = self.workers[assignment.worker_id]
        held = self._held[role][assignment.request_id]
        request, view = held.request, worker.counts
        hashes, size = request.block_hashes if view.info.caches_prefixes else (), view.info.block_size
        overlap = held.overlaps().get(view.slot, 0) if hashes else 0
        # An engine computes at least the last token of a prompt.
        computable = (len(request.prompt) - 1) // size
        cached = (computable if held.moves_kv else min(overlap, computable)) * size
        booked = Booked(request, overlap, now_s, len(request.prompt) - cached)
        self.let_go(request.id, role)
        worker.tracked.send(booked)
        reservation = None
        if hashes:
            reservation = self.index.reserve(view.slot, hashes[:_MOST_RESERVED])
            self.traffic.sent(hashes[:_MOST_RESERVED], min(overlap, _MOST_RESERVED), now_s)
        booking = Booking(worker, booked, now_s - held.held_since_s, assignment.cost_ms, reservation)
        worker.bookings[request.id] = booking
        return booking


def _check(plan: Plan, held: Sequence[HeldRequest], workers: Sequence[Worker]) -> None:
    """Raises ValueError for a plan that names strangers, a request twice, or more than a worker's slots."""
    ids = {waiting.request.id for waiting in held}
    slots = {worker.counts.worker_id: worker.counts.free_slots for worker in workers}
    for assignment in plan.assignments:
        if assignment.request_id not in ids:
            raise ValueError(f"the plan assigns request {assignment.request_id}, which is not held, or twice")
        ids.discard(assignment.request_id)
        if slots.get(assignment.worker_id, 0) <= 0:
            raise ValueError(f"the plan gives {assignment.worker_id} more than its free slots")
        slots[assignment.worker_id] -= 1
