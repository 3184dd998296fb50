"""The workers of a replay as a mode sees them, and what they report to the router: as in the server, without a wire."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from msgspec.structs import replace

from trtserve.plugins.api import (
    Finish,
    FinishReason,
    HandOver,
    KVCleared,
    KVEvent,
    KVRemoved,
    KVStored,
    OutputSink,
    Placement,
    Prediction,
    Request,
    RequestId,
    RequestRefused,
    Role,
    StepOutputs,
    WorkerId,
)
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.server.metrics import Metrics
from trtserve.server.replay.hand_over import Links, ReplayHandOver, TransferModel
from trtserve.server.replay.measures import MeasuredRequest
from trtserve.server.replay.virtual_time import ReportClock
from trtserve.server.replay.worker import VirtualWorker
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.feed import Change
from trtserve.server.router.router import QueueLimits, Router, ServerBooking
from trtserve.server.router.transfer_times import TransferTimes


class SettlingRouter(Router):
    """The server's router, which has workers report what is over before it decides anything."""

    def __init__(
        self, core: RoutingCore, limits: QueueLimits, metrics: Metrics, policy_name: str, clock: Callable[[], float]
    ) -> None:
        super().__init__(core, limits, metrics, policy_name, clock)
        self._settle: Callable[[Role], None] = lambda role: None

    def settle_by(self, settle: Callable[[Role], None]) -> None:
        """Call this before a decision about workers of that role."""
        self._settle = settle

    def plan_soon(self, role: Role) -> None:
        """An instant of virtual time is one turn, and what happens in it happens in order."""
        self.plan(role)

    def plan(self, role: Role) -> None:
        if self.num_held:
            self._settle(role)
        super().plan(role)


@dataclass(slots=True, eq=False)
class _Run:
    worker: VirtualWorker
    sink: OutputSink
    ended: asyncio.Future[Finish]


class ReplayCluster:
    """Implements `Cluster` for modes."""

    def __init__(
        self,
        router: SettlingRouter,
        clock: ReportClock,
        output_tokens: Mapping[RequestId, int],
        event_lag_s: float = 0.0,
        limits: SchedulerLimits | None = None,
        transfer: TransferModel | None = None,
    ) -> None:
        """`output_tokens`: what requests really generate, which the router must not know. `event_lag_s`: the router
        hears of KV events so much later than of everything else. limits: of every worker, for modes that move KV."""
        self._router = router
        self._clock = clock
        self._output_tokens = output_tokens
        self._event_lag_s = event_lag_s
        self._workers: dict[WorkerId, VirtualWorker] = {}
        self._numbers: dict[WorkerId, int] = {}
        self._runs: dict[RequestId, _Run] = {}
        self._measured: dict[RequestId, MeasuredRequest] = {}
        self._next_event: dict[WorkerId, int] = {}
        self._limits = limits
        self._hand_overs: dict[RequestId, ReplayHandOver] = {}
        self.links = Links(transfer or TransferModel())
        self._transfer_times = TransferTimes()
        self._transfer_times.bytes_per_token = self.links.model.bytes_per_token
        self.events: Counter[str] = Counter()
        router.settle_by(self._settle)

    def add(self, worker: VirtualWorker) -> None:
        """A worker that reports to `report` and that the router knows already."""
        self._numbers[worker.worker_id] = len(self._workers)
        self._workers[worker.worker_id] = worker
        self._next_event[worker.worker_id] = 0

    def measure(self, request_id: RequestId, measured: MeasuredRequest) -> None:
        """Tell it where the request is placed first."""
        self._measured[request_id] = measured

    # -------------------------------------------------------------- Cluster

    async def place(self, request: Request, role: Role, moves_kv: bool = False) -> ServerBooking:
        placement = await self._router.place(request, role, moves_kv)
        measured = self._measured.pop(request.id, None)
        if measured is not None:
            measured.placed(self._numbers[placement.worker_id], placement.booking.held_s)
        return placement

    async def run(
        self, placement: Placement, request: Request, sink: OutputSink, hand_over: HandOver | None = None
    ) -> Finish:
        worker = self._workers[placement.worker_id]
        if hand_over is not None:
            assert isinstance(hand_over, ReplayHandOver)
            hand_over.expect(worker)
        left = self._output_tokens[request.id] - request.num_resumed
        real = min(left, request.sampling.max_tokens)
        ended: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()
        self._runs[request.id] = _Run(worker, sink, ended)
        try:
            try:
                worker.submit(replace(request, sampling=replace(request.sampling, max_tokens=real)))
            except RequestRefused as refusal:
                del self._runs[request.id]
                return Finish(FinishReason.ERROR, error=str(refusal))
            finish = await ended
            # What ends before anybody said so has met its end-of-sequence token.
            return replace(finish, reason=FinishReason.STOP) if real == left else finish
        finally:
            if self._runs.pop(request.id, None) is not None:
                worker.cancel(request.id)

    def stop(self, request_id: RequestId) -> None:
        run = self._runs.pop(request_id, None)
        if run is not None:
            run.worker.cancel(request_id)
            if not run.ended.done():
                run.ended.set_result(Finish(FinishReason.STOP))

    def hand_over(self, request: Request) -> ReplayHandOver:
        assert self._limits is not None, "a replay of a mode that moves KV is told the workers' limits"
        size = self._limits.block_size
        hashes = request.block_hashes or block_hashes(request.prompt, size, request.cache_salt)
        return ReplayHandOver(request, hashes, size, self._limits.max_num_tokens, self, self._clock)

    def predict(self, request: Request, role: Role) -> Prediction | None:
        self._settle(role)
        return self._router.predict(request, role)

    def transfer_ms(self, num_tokens: int) -> float:
        return self._transfer_times.transfer_ms(num_tokens)

    def count(self, event: str) -> None:
        self.events[event] += 1

    def note(self, request_id: RequestId, **why: str | float) -> None:
        """Nobody asks."""

    # -------------------------------------------------------------- ReplayedMoves

    def worker(self, worker_id: WorkerId) -> VirtualWorker:
        return self._workers[worker_id]

    def entered(self, hand_over: ReplayHandOver) -> None:
        self._hand_overs[hand_over.request.id] = hand_over

    def left(self, hand_over: ReplayHandOver) -> None:
        del self._hand_overs[hand_over.request.id]

    def moved(self, num_tokens: int, duration_s: float) -> None:
        self._transfer_times.observe(int(num_tokens * self.links.model.bytes_per_token), duration_s)

    # -------------------------------------------------------------- what workers report

    def report(self, worker_id: WorkerId, step: StepOutputs, ended_s: float) -> None:
        """In the order in which the server hears of a step."""
        with self._clock.at(ended_s):
            if step.events:
                self._tell_events(worker_id, step.events, ended_s)
            for output in step.outputs:
                if output.cached_tokens is not None:
                    self._router.prompt_done(worker_id, output.request_id, output.cached_tokens)
                    run = self._runs.get(output.request_id)
                    if run is not None:
                        run.sink.cached(output.cached_tokens)
            if self._hand_overs:
                self._publish(worker_id, step)
            tokens, rows = self._push(step)
            self._router.pass_ended(worker_id, step.stats, step.load, tokens, rows)

    def _publish(self, worker_id: WorkerId, step: StepOutputs) -> None:
        """What the pass has computed of prompts whose KV moves on."""
        answered = {output.request_id for output in step.outputs if output.token_ids}
        for hand_over in list(self._hand_overs.values()):
            if hand_over.source is not None and hand_over.source.worker_id == worker_id:
                hand_over.pass_ended(hand_over.request.id in answered)

    def _push(self, step: StepOutputs) -> tuple[int, int]:
        """Tokens and ends to whom they belong; returns (tokens, requests that got some)."""
        tokens = rows = 0
        for output in step.outputs:
            run = self._runs.get(output.request_id)
            if output.token_ids:
                rows += 1
                tokens += len(output.token_ids)
                if run is not None:
                    run.sink.push(output.token_ids, output.logprobs)
            if run is not None and output.finish_reason is not None:
                del self._runs[output.request_id]
                if not run.ended.done():
                    run.ended.set_result(
                        Finish(output.finish_reason, output.stop_token_id, output.error, output.kv_handle)
                    )
        return tokens, rows

    def _tell_events(self, worker_id: WorkerId, events: Sequence[KVEvent], ended_s: float) -> None:
        first, changes = self._next_event[worker_id], tuple(map(_change_of, events))
        self._next_event[worker_id] = first + len(changes)
        if not self._event_lag_s:
            self._router.events(worker_id, first, changes)
            return
        loop = asyncio.get_running_loop()
        loop.call_at(ended_s + self._event_lag_s, self._router.events, worker_id, first, changes)

    def _settle(self, role: Role) -> None:
        for worker in self._of_role(role):
            worker.settle()

    def _of_role(self, role: Role) -> Iterable[VirtualWorker]:
        return (worker for worker in self._workers.values() if worker.role is role)


def _change_of(event: KVEvent) -> Change:
    match event:
        case KVStored():
            return "stored", [block.hash for block in event.blocks]
        case KVRemoved():
            return "removed", event.hashes
        case KVCleared():
            return "cleared", ()
        case _:
            assert_never(event)
