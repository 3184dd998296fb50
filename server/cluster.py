"""The workers as a mode sees them: the router says who, the client of that worker runs it."""

from __future__ import annotations

import asyncio
import time

from trtserve.plugins.api import Finish, OutputSink, Placement, Request, RequestId, Role
from trtserve.server.errors import Overloaded
from trtserve.server.metrics import Metrics, ServerSample, WorkerSample
from trtserve.server.requests import LiveRequests
from trtserve.server.router.router import Booking, Router
from trtserve.server.workers.client import WorkerClient, WorkerState
from trtserve.server.workers.pool import WorkerPool


class ServerCluster:
    """Implements `Cluster` for modes and `PoolListener` for the pool, which keeps the router's view of capacity."""

    def __init__(self, router: Router, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics
        self._route_seconds = metrics.stages["route"]
        self._pool: WorkerPool | None = None
        self._came = asyncio.Event()
        self._max_seq_len: int | None = None

    def attach(self, pool: WorkerPool) -> None:
        """The pool that runs what the router places; it needs this object first."""
        self._pool = pool

    @property
    def pool(self) -> WorkerPool:
        assert self._pool is not None, "attach comes before any request"
        return self._pool

    # -------------------------------------------------------------- Cluster

    async def place(self, request: Request, role: Role) -> Booking:
        started_s = time.perf_counter()
        try:
            return await self._router.place(request, role)
        finally:
            self._route_seconds.observe(time.perf_counter() - started_s)

    async def run(self, placement: Placement, request: Request, sink: OutputSink) -> Finish:
        return await self.pool[placement.worker_id].run(request, sink)

    def stop(self, request_id: RequestId) -> None:
        any(client.stop(request_id) for client in self.pool)

    # -------------------------------------------------------------- PoolListener

    def worker_ready(self, client: WorkerClient) -> None:
        assert client.info is not None
        self._router.add_worker(client.worker_id, client.role, client.info, lambda: client.load)
        self._measure()
        self._came.set()

    def worker_gone(self, client: WorkerClient) -> None:
        self._router.remove_worker(client.worker_id)
        self._measure()

    def _measure(self) -> None:
        self._max_seq_len = min((info.max_seq_len for info in self._router.infos()), default=None)

    # -------------------------------------------------------------- questions

    def max_seq_len(self) -> int:
        """The longest sequence that every ready worker takes. Raises Overloaded when none is ready."""
        if self._max_seq_len is None:
            self._metrics.rejections.labels("no_worker").inc()
            raise Overloaded("no worker is ready", code="no_worker", retry_after_s=5.0)
        return self._max_seq_len

    def is_ready(self, roles: set[Role]) -> bool:
        """Whether a worker of every role is ready."""
        return roles <= {client.role for client in self.pool if client.state is WorkerState.READY}

    async def ready(self, roles: set[Role]) -> None:
        """Return when a worker of every role is ready."""
        while not self.is_ready(roles):
            self._came.clear()
            await self._came.wait()

    def sample(self, live: LiveRequests) -> ServerSample:
        """The state for a scrape of the metrics."""
        workers = [self._sample_worker(client) for client in self.pool]
        return ServerSample(len(live), self._router.num_held, self._router.held_tokens, workers)

    def _sample_worker(self, client: WorkerClient) -> WorkerSample:
        load, info = client.load, client.info
        is_ready = client.state is WorkerState.READY and info is not None
        return WorkerSample(
            worker_id=client.worker_id,
            role=client.role,
            is_ready=is_ready,
            running=load.running,
            waiting=load.waiting,
            num_blocks=info.num_blocks if info is not None else 0,
            free_blocks=load.free_blocks,
            block_size=info.block_size if info is not None else 0,
            booked_requests=self._router.booked(client.worker_id)[0],
            restarts=client.restarts,
            prompt_tokens=load.prompt_tokens_total,
            cached_tokens=load.cached_tokens_total,
            generated_tokens=load.generated_tokens_total,
            preemptions=load.preemptions_total,
        )
