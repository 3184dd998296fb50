"""The workers as a mode sees them: the router says who, the client of that worker runs it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from trtserve.plugins.api import (
    BlockHash,
    Finish,
    HandOver,
    OutputSink,
    Placement,
    Prediction,
    Request,
    RequestId,
    Role,
    TokenIds,
    WorkerId,
)
from trtserve.plugins.blocks import block_hashes
from trtserve.server.context import ContextLimits, context_limits
from trtserve.server.departures import Departures
from trtserve.server.errors import Overloaded
from trtserve.server.hand_over import EXTEND_S, ServerHandOver
from trtserve.server.metrics import LinkSample, Metrics, ServerSample, WorkerSample
from trtserve.server.requests import LiveRequests
from trtserve.server.router.bookings import Booking
from trtserve.server.router.core import IndexCheck
from trtserve.server.router.router import Router, ServerBooking
from trtserve.server.router.transfer_times import TransferTimes
from trtserve.server.workers.client import WorkerClient, WorkerState
from trtserve.server.workers.kv_links import KVLink
from trtserve.server.workers.kv_messages import KVFetched
from trtserve.server.workers.pool import WorkerPool
from trtserve.server.workers.ranks import split

_CHECK_DEADLINE_S = 10.0
_INLINE_BLOCKS = 1000  # hashed within half a millisecond


class ServerCluster:
    """Implements `Cluster` for modes, and answers what the API asks of routing and workers."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics
        self._route_seconds = metrics.stages["route"]
        self._pool: WorkerPool | None = None
        self._came = asyncio.Event()
        self._limits: ContextLimits | None = None
        self._block_size: int | None = None
        self._explained: dict[RequestId, list[Booking]] = {}
        self._notes: dict[RequestId, dict[str, str | float]] = {}
        self._hand_overs: set[ServerHandOver] = set()
        self._transfer_times = TransferTimes()
        self._departures = Departures(metrics.cancel_to_free)

    def attach(self, pool: WorkerPool) -> None:
        """The pool that runs what the router places; it needs this object first."""
        self._pool = pool

    @property
    def pool(self) -> WorkerPool:
        assert self._pool is not None, "attach comes before any request"
        return self._pool

    # -------------------------------------------------------------- Cluster

    async def place(self, request: Request, role: Role, moves_kv: bool = False) -> ServerBooking:
        started_s = time.perf_counter()
        try:
            placement = await self._router.place(request, role, moves_kv)
        finally:
            self._route_seconds.observe(time.perf_counter() - started_s)
        explained = self._explained.get(request.id)
        if explained is not None:
            explained.append(placement.booking)
        return placement

    async def run(
        self, placement: Placement, request: Request, sink: OutputSink, hand_over: HandOver | None = None
    ) -> Finish:
        worker_id, rank = split(placement.worker_id)
        client = self.pool[worker_id]
        if rank is not None:
            request = replace(request, rank=rank)
        self._departures.runs(request.id, hand_over is not None)
        if hand_over is None:
            return await client.run(request, sink)
        assert isinstance(hand_over, ServerHandOver)
        hand_over.expect(client)
        finish = await client.run(request, sink, keep_kv=True, on_kv=hand_over.on_kv)
        hand_over.prefilled(finish)
        return finish

    def hand_over(self, request: Request) -> ServerHandOver:
        return ServerHandOver(request, self)

    def predict(self, request: Request, role: Role) -> Prediction | None:
        return self._router.predict(request, role)

    def transfer_ms(self, num_tokens: int) -> float:
        return self._transfer_times.transfer_ms(num_tokens)

    def count(self, event: str) -> None:
        self._metrics.mode_events.labels(event).inc()

    def stop(self, request_id: RequestId) -> None:
        any(client.stop(request_id) for client in self.pool)

    def over(self, request_id: RequestId, cancelled_s: float | None, has_tokens: bool) -> None:
        """The mode is done with a sequence. cancelled_s: when it was cancelled, by time.monotonic(), if it was."""
        self._departures.over(request_id, cancelled_s, has_tokens, self.pool)

    # -------------------------------------------------------------- HandOverListener

    def hand_over_began(self, hand_over: ServerHandOver) -> None:
        self._hand_overs.add(hand_over)

    def hand_over_ended(self, hand_over: ServerHandOver) -> None:
        self._hand_overs.discard(hand_over)

    def fetched(self, fetch: KVFetched, is_valid: bool, waited_s: float) -> None:
        """A decode worker has read what it could, and the request waited for it."""
        outcome = "valid" if is_valid else "lease_expired" if fetch.ok else "failed"
        self._metrics.kv_fetches.labels(outcome, fetch.lane).inc()
        self._metrics.kv_fetched_bytes.labels(fetch.lane).inc(fetch.num_bytes)
        self._metrics.kv_fetch_seconds.observe(fetch.duration_s)
        self._metrics.kv_hand_over_seconds.observe(waited_s)
        if is_valid:
            self._transfer_times.observe(fetch.num_bytes, fetch.duration_s)

    def client(self, worker_id: WorkerId) -> WorkerClient:
        return self.pool[split(worker_id)[0]]

    async def extend_leases(self) -> None:
        """Keep the leases of live requests from ending. Runs as long as the server does."""
        while True:
            await asyncio.sleep(EXTEND_S)
            leases: dict[WorkerClient, list[int]] = {}
            for hand_over in self._hand_overs:
                if hand_over.lease_id and hand_over.source is not None:
                    leases.setdefault(hand_over.source, []).append(hand_over.lease_id)
            for client, lease_ids in leases.items():
                client.kv.extend(lease_ids)

    # -------------------------------------------------------------- workers

    def is_in_use(self, client: WorkerClient) -> bool:
        """Whether anything is booked on a worker, runs there, or moves from or to it."""
        return bool(
            self.booked(client)
            or client.num_running
            or not client.kv.is_idle
            or any(hand_over.uses(client) for hand_over in self._hand_overs)
        )

    def booked(self, client: WorkerClient) -> int:
        """Sequences placed on a worker that have not ended."""
        return sum(self._router.booked(routed_id)[0] for routed_id in client.routed_ids)

    def drain(self, client: WorkerClient, is_draining: bool) -> None:
        """Place nothing more on a worker, or again."""
        for routed_id in client.routed_ids:
            self._router.drain(routed_id, is_draining)

    def capacity_changed(self) -> None:
        """A worker has come or gone."""
        infos = self._router.infos()
        self._limits = context_limits(infos)
        self._block_size = infos[0][1].block_size if infos else None  # all have one size: the handshake sees to it
        port = next((client.kv.port for client in self.pool if client.kv.port is not None), None)
        if port is not None and self._block_size:
            self._transfer_times.bytes_per_token = port.block_bytes / self._block_size
        self._came.set()

    def resync(self, worker_id: WorkerId) -> None:
        """The index has missed some of a worker's events: ask for its whole set."""
        self.client(worker_id).send_resync()

    # -------------------------------------------------------------- routing

    async def hash_prompt(self, prompt: TokenIds, cache_salt: str) -> tuple[BlockHash, ...]:
        """The block hashes that routing needs; none where the policy looks at no prefixes."""
        size = self._block_size
        if size is None or not self._router.core.policy.uses_prefixes:
            return ()
        if len(prompt) <= size * _INLINE_BLOCKS:
            return block_hashes(prompt, size, cache_salt)
        return await asyncio.to_thread(block_hashes, prompt, size, cache_salt)

    def router_state(self) -> dict[str, Any]:
        """For GET /v1/router/state."""
        return self._router.describe()

    async def check_index(self) -> dict[WorkerId, IndexCheck | None]:
        """Compare the prefix index with what each ready worker says it has stored; the index takes that over. None for
        a worker that gave no answer in time or publishes no events."""
        clients = [client for client in self.pool if client.state is WorkerState.READY]
        checks = {name: self._router.next_check(name) for client in clients for name in client.routed_ids}
        asked = [checks[name] for client in clients if client.send_resync() for name in client.routed_ids]
        try:
            if asked:
                await asyncio.wait(asked, timeout=_CHECK_DEADLINE_S)
            return {name: check.result() if check.done() else None for name, check in checks.items()}
        finally:
            for check in checks.values():
                check.cancel()

    def explain(self, request_id: RequestId) -> list[Booking]:
        """A list that gets every booking of this request from now on, until `explained`."""
        return self._explained.setdefault(request_id, [])

    def explained(self, request_id: RequestId) -> None:
        """The end of `explain`; nothing happens where it was not asked for."""
        self._explained.pop(request_id, None)
        self._notes.pop(request_id, None)

    def note(self, request_id: RequestId, **why: str | float) -> None:
        if request_id in self._explained:
            self._notes.setdefault(request_id, {}).update(why)

    def notes(self, request_id: RequestId) -> Mapping[str, str | float]:
        """What the mode had to say about a request that is explained."""
        return self._notes.get(request_id, {})

    # -------------------------------------------------------------- questions

    def context_limits(self) -> ContextLimits:
        """How long prompts and sequences may be. Raises Overloaded when no worker is ready."""
        if self._limits is None:
            self._metrics.rejections.labels("no_worker").inc()
            raise Overloaded("no worker is ready", code="no_worker", retry_after_s=5.0)
        return self._limits

    @property
    def max_seq_len(self) -> int | None:
        """Of `context_limits`, for those who only want to tell it; None when no worker is ready."""
        return None if self._limits is None else self._limits.max_seq_len

    def supports_guided_decoding(self) -> bool:
        """Whether every ready worker's engine does; False without one."""
        clients = [client for client in self.pool if client.state is WorkerState.READY]
        return bool(clients) and all(client.info and client.info.supports_guided_decoding for client in clients)

    def is_ready(self, roles: set[Role]) -> bool:
        """Whether a worker of every role is ready."""
        ready = (client for client in self.pool if client.state is WorkerState.READY and not client.is_warming)
        return roles <= {client.role for client in ready}

    async def ready(self, roles: set[Role]) -> None:
        """Return when a worker of every role is ready."""
        while not self.is_ready(roles):
            self._came.clear()
            await self._came.wait()

    def sample(self, live: LiveRequests) -> ServerSample:
        """The state for a scrape of the metrics."""
        workers = [self._sample_worker(client) for client in self.pool]
        links = [_sample_link(client, link) for client in self.pool for link in client.kv.links]
        return ServerSample(len(live), self._router.num_held, self._router.held_tokens, workers, links)

    def _sample_worker(self, client: WorkerClient) -> WorkerSample:
        load, info = client.load, client.info
        is_ready = client.state is WorkerState.READY and info is not None
        indexed = [self._router.core.indexed(routed_id) for routed_id in client.routed_ids]
        return WorkerSample(
            worker_id=client.worker_id,
            role=client.role,
            is_ready=is_ready,
            running=load.running,
            waiting=load.waiting,
            num_blocks=info.num_blocks * info.num_ranks if info is not None else 0,
            free_blocks=load.free_blocks,
            block_size=info.block_size if info is not None else 0,
            booked_requests=self.booked(client),
            restarts=client.restarts,
            prompt_tokens=load.prompt_tokens_total,
            cached_tokens=load.cached_tokens_total,
            generated_tokens=load.generated_tokens_total,
            preemptions=load.preemptions_total,
            drafted_tokens=load.drafted_tokens_total,
            accepted_tokens=load.accepted_tokens_total,
            lost_kv_events=load.lost_kv_events_total,
            indexed_blocks=sum(blocks for blocks, _ in indexed),
            event_gaps=sum(gaps for _, gaps in indexed),
        )


def _sample_link(reader: WorkerClient, link: KVLink) -> LinkSample:
    return LinkSample(
        source=link.worker_id,
        reader=reader.worker_id,
        is_up=link.is_up,
        transfer=link.transfer,
        lane=link.lane,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        failures=link.failures,
    )
