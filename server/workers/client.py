"""The server's view of one worker: what was submitted to it, what it reported, whether it is well."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
from msgspec.structs import replace

from trtserve.plugins.api import (
    EngineInfo,
    Finish,
    FinishReason,
    KVHandle,
    OutputSink,
    Request,
    RequestId,
    Role,
    TokenLogprob,
    WorkerId,
    WorkerLoad,
)
from trtserve.server.errors import Internal, WorkerLost
from trtserve.server.workers import wire
from trtserve.server.workers.kv_client import KVClient, OnKV
from trtserve.server.workers.kv_messages import KVPort
from trtserve.server.workers.ranks import routed_ids, total_load

logger = logging.getLogger(__name__)


class WorkerState(StrEnum):
    """Of the process behind a worker's id."""

    STARTING = "starting"  # no process, or one that loads
    READY = "ready"
    GONE = "gone"  # ended or given up; a restart makes it STARTING


class _Run(msgspec.Struct):
    """One submitted request: where its tokens go and who waits for its end."""

    sink: OutputSink
    ended: asyncio.Future[Finish]


class StepListener(Protocol):
    """Who wants to know what workers report (the router). Called on the event loop, must not block and must not raise,
    but for ValueError where what a worker says makes no sense.

    The warm-up's steps come before the worker is ready, when `client.info` is not that of this incarnation; its
    requests have ids that the server never gave out.
    """

    def on_step(self, client: WorkerClient, step: wire.Step) -> None:
        """What a step says beside its tokens: events, prompts that are done, load, statistics. Comes when the tokens of
        all steps that were read with it are on their way to the clients, before any task has heard of them, and before
        whatever else the worker says. Hot."""

    def on_blocks(self, client: WorkerClient, blocks: wire.Blocks) -> None:
        """The answer to `WorkerClient.send_resync`: a rank's whole set, in its place among the steps."""


class WorkerClient:
    """Submits requests to one worker and hands their tokens on. Lives on the event loop; survives restarts.

    `send` is bound to the connection of the present incarnation by the pool. A token costs a dictionary lookup and a
    call of its sink; the tasks that wait are woken at the end only.
    """

    def __init__(self, worker_id: WorkerId, role: Role, listener: StepListener) -> None:
        self.worker_id = worker_id
        self.role = role
        self._listener = listener
        self.state = WorkerState.STARTING
        self.phase = "not started"
        self.info: EngineInfo | None = None
        self.is_warming = False  # ready, and not to be given requests yet: see `PairWarmUp`
        self.routed_ids = [worker_id]
        """By which the router knows it: one a rank, see `ranks`."""
        self._loads = {0: WorkerLoad()}  # by rank
        self.steps = 0
        self.last_heard_s = self.last_step_s = time.monotonic()
        self.restarts = 0
        self._runs: dict[int, _Run] = {}
        self._pushes: dict[int, Callable[[Sequence[int], None], None]] = {}  # the sinks' methods, for the hot path
        # Not wanted any more, and the worker has not said yet that it holds nothing of them.
        self._cancelled: dict[int, Callable[[], None] | None] = {}
        self.on_unreachable: Callable[[], None] = _nothing
        """Called when a request cannot be sent though it is ready; the pool gives it up then."""
        self._send: Callable[[wire.ToWorker], bool] | None = None
        self.kv = KVClient(worker_id, self.send)

    # -------------------------------------------------------------- connection, driven by the pool

    def connected(self, send: Callable[[wire.ToWorker], bool], incarnation: int) -> None:
        """A new incarnation said hello."""
        self._send = send
        self.kv.connected(incarnation)
        self.steps = 0
        self._loads = {0: WorkerLoad()}
        self.heard()

    def ready(self, info: EngineInfo, kv: KVPort | None = None) -> None:
        self.info = info
        self.routed_ids = routed_ids(self.worker_id, info)
        self.kv.port = kv
        self.state = WorkerState.READY
        self.phase = "ready"
        self.last_step_s = time.monotonic()

    def gone(self, reason: str) -> None:
        """The process has ended or is given up: every request on it fails now, with that reason. Idempotent."""
        self.state = WorkerState.GONE
        self.is_warming = False
        self.phase = reason
        self._send = None
        cancelled, self._cancelled = self._cancelled, {}
        for let_go in filter(None, cancelled.values()):
            let_go()
        self._pushes.clear()
        runs, self._runs = self._runs, {}
        for run in runs.values():
            if not run.ended.done():
                run.ended.set_exception(WorkerLost(f"worker {self.worker_id} was lost: {reason}"))
                run.ended.exception()  # retrieved: nobody may be waiting any more
        self.kv.gone(reason)

    def heard(self) -> None:
        self.last_heard_s = time.monotonic()

    def send(self, message: wire.ToWorker) -> bool:
        """False when there is no connection or the worker does not read."""
        return self._send is not None and self._send(message)

    def send_resync(self) -> bool:
        """Ask which blocks are stored; `StepListener.on_blocks` gets the answer. False as for `send`."""
        return self.send(wire.Resync())

    # -------------------------------------------------------------- requests

    @property
    def num_ranks(self) -> int:
        """Attention-DP ranks, see `ranks`."""
        return len(self.routed_ids)

    @property
    def load(self) -> WorkerLoad:
        """Of all ranks together, as last reported."""
        return total_load(self._loads)

    @property
    def moves_kv(self) -> bool:
        """Whether its engine hands KV over itself."""
        return self.info is not None and self.info.moves_kv

    def keeps(self, handle: KVHandle) -> bool:
        """Whether the process that made this handle is still there."""
        return self.state is WorkerState.READY and self.kv.incarnation == handle.incarnation

    @property
    def num_running(self) -> int:
        """Requests submitted whose end has not been reported; cancelled ones that the worker still holds included."""
        return len(self._runs) + len(self._cancelled)

    async def run(
        self, request: Request, sink: OutputSink, *, keep_kv: bool = False, on_kv: OnKV | None = None
    ) -> Finish:
        """Submit and wait for the end. Cancelling this call cancels the request on the worker.

        keep_kv: the worker keeps the prompt's KV readable under a lease. If the run then ends with LENGTH, `kv_handle`
        names all blocks, and the lease is the caller's to give back; `on_kv` hears of each part as it is there. After
        any other end, the lease is given back here. Where the engine moves KV itself, `on_kv` hears nothing, and
        whatever the end, the caller calls `let_go_of_kv` when the hand-over is over.

        Raises WorkerLost when the worker is not there or dies, and Internal when the sink raises.
        """
        if not keep_kv:
            return await self._run(request, sink, is_kept=False)
        with self.kv.expect(request.id, on_kv) as publication:
            finish = await self._run(request, sink, is_kept=True)
            if finish.reason is FinishReason.LENGTH and finish.kv_handle is None and self.kv.port is not None:
                finish = replace(finish, kv_handle=await publication.take())
            return finish

    async def _run(self, request: Request, sink: OutputSink, *, is_kept: bool) -> Finish:
        ended: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()
        is_idle = not self.num_running
        if is_idle:
            self.last_step_s = time.monotonic()
        is_ready = self.state is WorkerState.READY
        if is_ready:
            if not self.send(wire.submit_of(request, keep_kv=is_kept)):
                # Its process has ended and nobody has seen it yet: who tries again must not be sent here again.
                self.on_unreachable()
                is_ready = False
            elif is_idle:
                # The worker could begin now. ZeroMQ's thread has the message, and may share a core with this one.
                os.sched_yield()
        if not is_ready:
            raise WorkerLost(f"worker {self.worker_id} is not reachable: {self.phase}")
        self._runs[request.id] = _Run(sink, ended)
        self._pushes[request.id] = sink.push
        try:
            return await ended
        finally:
            self._pushes.pop(request.id, None)
            if self._runs.pop(request.id, None) is not None:
                self._cancelled[request.id] = None
                self.send(wire.Cancel(request.id))

    def let_go_of_kv(self, request_id: RequestId) -> None:
        """The KV that an engine keeps of this prefill is not needed any more. Ignored by one that keeps none."""
        self.send(wire.Cancel(request_id))

    # -------------------------------------------------------------- what the worker reports

    def on_heartbeat(self, message: wire.Heartbeat) -> None:
        if self.num_ranks == 1:
            self._loads[0] = message.load
        if message.kv is not None:
            self.kv.usage = message.kv
        if message.steps != self.steps:
            self._advanced(message.steps)

    def on_step(self, step: wire.Step) -> None:
        """Its tokens and ends to whom they belong; `account` follows. Hot: runs once per engine step, its inner loop
        once per row. A sink that raises fails its own request. Raises ValueError or TypeError where the step makes no
        sense."""
        self._advanced(step.number)
        if step.rank and not 0 < step.rank < self.num_ranks and self.state is WorkerState.READY:
            raise ValueError(f"a step of rank {step.rank}, of {self.num_ranks}")
        self._loads[step.rank] = step.load
        details = self._before_tokens(step) if step.details else None
        token_ids: list[int] = memoryview(step.token_ids).cast("i").tolist()
        request_ids: list[int] = memoryview(step.request_ids).cast("Q").tolist()
        if step.counts or details:
            self._push_rows(request_ids, step.counts, token_ids, details or {})
        else:
            find = self._pushes.get
            for request_id, token_id in zip(request_ids, token_ids, strict=True):
                push = find(request_id)
                if push is not None:
                    try:
                        push((token_id,), None)
                    except Exception as error:
                        self._fail(RequestId(request_id), error)
        for detail in step.details:
            if detail.finish_reason is not None:
                self._finish(detail, FinishReason(detail.finish_reason))

    def account(self, step: wire.Step) -> None:
        """The rest of a step, after `on_step`. Raises ValueError where it makes no sense."""
        self._listener.on_step(self, step)

    def on_blocks(self, message: wire.Blocks) -> None:
        """Raises ValueError where the message makes no sense."""
        if message.next_event < 0 or len(message.hashes) % 8 or not 0 <= message.rank < self.num_ranks:
            raise ValueError(f"{len(message.hashes)} bytes of hashes before event {message.next_event}")
        self._listener.on_blocks(self, message)

    def _advanced(self, steps: int) -> None:
        self.steps = steps
        self.last_step_s = time.monotonic()

    def _before_tokens(self, step: wire.Step) -> dict[int, tuple[TokenLogprob, ...]]:
        logprobs = {}
        for detail in step.details:
            run = self._runs.get(detail.request_id)
            if run is None:
                continue
            if detail.cached_tokens is not None:
                try:
                    run.sink.cached(detail.cached_tokens)
                except Exception as error:
                    self._fail(detail.request_id, error)
            if detail.logprobs is not None:
                logprobs[int(detail.request_id)] = detail.logprobs
        return logprobs

    def _push_rows(
        self,
        request_ids: list[int],
        packed_counts: bytes,
        token_ids: list[int],
        logprobs: dict[int, tuple[TokenLogprob, ...]],
    ) -> None:
        counts = memoryview(packed_counts).cast("H").tolist() if packed_counts else [1] * len(request_ids)
        start = 0
        for request_id, count in zip(request_ids, counts, strict=True):
            run = self._runs.get(request_id)
            if run is not None:
                try:
                    run.sink.push(token_ids[start : start + count], logprobs.get(request_id))
                except Exception as error:
                    self._fail(RequestId(request_id), error)
            start += count

    def _finish(self, detail: wire.Detail, reason: FinishReason) -> None:
        handle = detail.kv_handle
        if handle is not None:
            wire.check_descriptor(handle)  # while the run can still fail with the worker
            handle = replace(handle, worker_id=self.worker_id, incarnation=self.kv.incarnation)
        let_go = self._cancelled.pop(detail.request_id, None)
        if let_go is not None:
            let_go()
        self._pushes.pop(detail.request_id, None)
        run = self._runs.pop(detail.request_id, None)
        if run is not None and not run.ended.done():
            finish = Finish(
                reason,
                detail.stop_token_id,
                detail.error,
                handle,
                detail.kv_lost,
                detail.is_refused,
                detail.speculation,
            )
            run.ended.set_result(finish)

    def stop(self, request_id: RequestId) -> bool:
        """End a request early on the server's word; False when it does not run here."""
        run = self._call_off(request_id)
        if run is not None and not run.ended.done():
            run.ended.set_result(Finish(FinishReason.STOP))
        return run is not None

    def _fail(self, request_id: RequestId, error: Exception) -> None:
        """Its tokens could not be taken: a defect of the server, which costs this request and no other."""
        logger.error("request %d on %s: its tokens could not be taken", request_id, self.worker_id, exc_info=error)
        run = self._call_off(request_id)
        if run is not None and not run.ended.done():
            run.ended.set_exception(Internal())
            run.ended.exception()  # retrieved: nobody may be waiting any more

    def _call_off(self, request_id: RequestId) -> _Run | None:
        """None when it does not run here."""
        self._pushes.pop(request_id, None)
        run = self._runs.pop(request_id, None)
        if run is not None:
            self._cancelled[request_id] = None
            self.send(wire.Cancel(request_id))
        return run

    def when_let_go(self, request_id: RequestId, let_go: Callable[[], None]) -> bool:
        """Call back once the worker holds nothing of a cancelled request any more, or is lost. False where it holds
        nothing now: nobody is called then."""
        if request_id not in self._cancelled:
            return False
        self._cancelled[request_id] = let_go
        return True

    # -------------------------------------------------------------- health

    def excuse(self, late_s: float, now_s: float) -> None:
        """The server itself did not run for so long, so that nothing was heard in that time says nothing. now_s:
        time.monotonic()."""
        self.last_heard_s = min(self.last_heard_s + late_s, now_s)
        self.last_step_s = min(self.last_step_s + late_s, now_s)

    def trouble(self, now_s: float, silence_limit_s: float, stall_limit_s: float) -> str | None:
        """What is wrong with a ready worker, in words; None if all is well. now_s: time.monotonic()."""
        if self.state is not WorkerState.READY:
            return None
        if now_s - self.last_heard_s > silence_limit_s:
            return f"no heartbeat for {now_s - self.last_heard_s:.0f} s"
        if self.num_running and now_s - self.last_step_s > stall_limit_s:
            return f"alive, but its engine made no step for {now_s - self.last_step_s:.0f} s with work pending"
        return None


def _nothing() -> None:
    pass
