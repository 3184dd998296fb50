"""The server's side of the KV hand-over with one worker: what it keeps for others, and what it fetches from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from msgspec.structs import replace

from trtserve.plugins.api import KVHandle, Request, RequestId, WorkerId
from trtserve.server.errors import WorkerLost
from trtserve.server.workers.kv_links import KVLinks
from trtserve.server.workers.kv_messages import (
    MAX_LEASES,
    KVAbort,
    KVCommit,
    KVExtend,
    KVFetched,
    KVPort,
    KVPublished,
    KVRelease,
    KVReleased,
    KVToWorker,
    KVUsage,
    fetch_of,
    handle_of,
)

OnKV = Callable[[KVHandle], None]
"""Called on the event loop for each part of a prompt whose KV can be read; must not block and must not raise."""


@dataclass(slots=True, eq=False)
class _Publication:
    """What a worker has said of one request's KV so far."""

    on_kv: OnKV | None
    whole: asyncio.Future[KVHandle | None]  # all parts as one handle; None where nothing is kept
    rows: list[int] = field(default_factory=list)
    is_taken: bool = False

    async def take(self) -> KVHandle | None:
        """Wait for the last part. The lease is the caller's then."""
        whole = await self.whole
        self.is_taken = True
        return whole


class KVClient:
    """Belongs to a `WorkerClient`, which binds it to each incarnation. Lives on the event loop.

    Of the worker with the prompt: `expect`, `release`, `drop`, `extend`. Of the worker that needs it: `fetch` for each
    handle of a request, `fetched`, then `commit` right before the request is submitted, or `abort` at any time. What
    waits fails with WorkerLost as soon as the worker is gone.
    """

    def __init__(self, worker_id: WorkerId, send: Callable[[KVToWorker], bool]) -> None:
        self._worker_id = worker_id
        self._send = send
        self.incarnation = 0
        self.port: KVPort | None = None  # None: it takes no part in the hand-over
        self.usage = KVUsage()  # as of the last heartbeat
        self.links = KVLinks(worker_id, send)
        self._publications: dict[RequestId, _Publication] = {}
        self._releases: dict[int, asyncio.Future[bool]] = {}
        self._fetches: dict[RequestId, asyncio.Future[KVFetched]] = {}

    # -------------------------------------------------------------- connection, driven by the WorkerClient

    def connected(self, incarnation: int) -> None:
        """A new process said hello."""
        self.incarnation = incarnation
        self.port, self.usage = None, KVUsage()
        self.links.clear()

    def gone(self, reason: str) -> None:
        """Everything that waits fails now. Idempotent."""
        self.port, self.usage = None, KVUsage()
        self.links.clear()
        waiting: list[asyncio.Future[KVHandle | None] | asyncio.Future[bool] | asyncio.Future[KVFetched]] = [
            *(publication.whole for publication in self._publications.values()),
            *self._releases.values(),
            *self._fetches.values(),
        ]
        self._publications, self._releases, self._fetches = {}, {}, {}
        for future in waiting:
            if not future.done():
                future.set_exception(WorkerLost(f"worker {self._worker_id} was lost: {reason}"))
                future.exception()  # retrieved: nobody may be waiting any more

    @property
    def is_idle(self) -> bool:
        """Whether no answer of the worker is awaited: on a prompt's KV, a lease, or a fetch."""
        return not (self._publications or self._releases or self._fetches)

    # -------------------------------------------------------------- the worker that has the blocks

    @contextmanager
    def expect(self, request_id: RequestId, on_kv: OnKV | None) -> Iterator[_Publication]:
        """Around the run of a request with keep_kv. Unless its KV was taken, the lease is given back: on leaving, or
        when the worker's last word on it comes."""
        publication = _Publication(on_kv, asyncio.get_running_loop().create_future())
        self._publications[request_id] = publication
        try:
            yield publication
        finally:
            self._publications.pop(request_id, None)
            self._drop_untaken(publication)

    async def release(self, lease_id: int, deadline_s: float) -> bool:
        """Give a lease back. True: it held until now, so what was read under it is right; False: it had ended, or there
        was no answer within deadline_s seconds. Raises WorkerLost."""
        answer = self._releases.get(lease_id)
        if answer is None:
            self._send_or_lose(KVRelease(lease_id))
            answer = self._releases[lease_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(deadline_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            return False

    def drop(self, lease_id: int) -> None:
        """Give a lease back without waiting for the answer."""
        self._send(KVRelease(lease_id))

    def extend(self, lease_ids: Sequence[int]) -> None:
        """These leases go on for another lease time from now. Call every few seconds while they are wanted."""
        for start in range(0, len(lease_ids), MAX_LEASES):
            self._send(KVExtend(tuple(lease_ids[start : start + MAX_LEASES])))

    # -------------------------------------------------------------- the worker that needs them

    def fetch(self, request: Request, handle: KVHandle) -> None:
        """Have it read what a handle of another worker names; once for each handle of a request, in their order, the
        last one is final. Raises WorkerLost."""
        if self.port is None:
            raise WorkerLost(f"worker {self._worker_id} cannot fetch KV: it takes no part in the hand-over")
        is_first = request.id not in self._fetches
        self._send_or_lose(fetch_of(request, handle, is_first=is_first))
        if is_first:
            self._fetches[request.id] = asyncio.get_running_loop().create_future()

    async def fetched(self, request_id: RequestId, deadline_s: float) -> KVFetched:
        """Wait for the end of a fetch. Raises TimeoutError after deadline_s seconds, and WorkerLost, also where the
        worker was lost before this call and has no such fetch any more. `commit` or `abort` are still due."""
        fetch = self._fetches.get(request_id)
        if fetch is None:
            raise WorkerLost(
                f"worker {self._worker_id} fetches nothing for request {request_id}: it was lost meanwhile"
            )
        async with asyncio.timeout(deadline_s):
            return await asyncio.shield(fetch)

    def commit(self, request_id: RequestId, is_valid: bool) -> None:
        """Put what was fetched into the worker's prefix cache, or drop it: is_valid, what `release` of its lease said.
        A request submitted behind it finds the blocks there."""
        if self._fetches.pop(request_id, None) is not None:
            self._send(KVCommit(request_id, is_valid))

    def abort(self, request_id: RequestId) -> None:
        """End a fetch in any state; who waits in `fetched` gets one that is not ok. Ignored after `commit`."""
        fetch = self._fetches.pop(request_id, None)
        if fetch is None:
            return
        self._send(KVAbort(request_id))
        if not fetch.done():
            fetch.set_result(KVFetched(request_id, False, 0, 0, 0.0, "", "it was aborted"))

    # -------------------------------------------------------------- what the worker reports

    def on_published(self, message: KVPublished) -> None:
        """Raises ValueError where the message makes no sense."""
        handle = handle_of(message, self._worker_id, self.incarnation)
        if self.port is None or max(handle.rows, default=0) >= self.port.num_rows:
            raise ValueError(f"it published KV of request {message.request_id} in rows that it does not have")
        publication = self._publications.get(message.request_id)
        if publication is None:
            if handle.is_final and handle.lease_id:
                self.drop(handle.lease_id)
            return
        if handle.first_block != len(publication.rows):
            raise ValueError(f"it published block {handle.first_block} after {len(publication.rows)}")
        publication.rows += handle.rows
        if handle.is_final:
            del self._publications[message.request_id]
            whole = replace(handle, first_block=0, rows=tuple(publication.rows)) if handle.lease_id else None
            if not publication.whole.done():
                publication.whole.set_result(whole)
        if publication.on_kv is not None:
            publication.on_kv(handle)

    def on_released(self, message: KVReleased) -> None:
        answer = self._releases.pop(message.lease_id, None)
        if answer is not None and not answer.done():
            answer.set_result(message.is_valid)

    def on_fetched(self, message: KVFetched) -> None:
        fetch = self._fetches.get(message.request_id)
        if fetch is not None and not fetch.done():
            fetch.set_result(message)

    def _drop_untaken(self, publication: _Publication) -> None:
        whole = publication.whole
        if publication.is_taken or not whole.done() or whole.cancelled() or whole.exception() is not None:
            return
        handle = whole.result()
        if handle is not None:
            self.drop(handle.lease_id)

    def _send_or_lose(self, message: KVToWorker) -> None:
        if not self._send(message):
            raise WorkerLost(f"worker {self._worker_id} is not reachable")
