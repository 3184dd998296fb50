"""One request's KV on its way from a prefill worker to a decode worker, as the server conducts it.

There are two ways, and bytes never pass through the server in either. An engine that moves KV itself
(`EngineInfo.moves_kv`) names it by a handle, which goes with the decode request and is all that they need. Of any
other engine, the prefill worker publishes rows under a lease; the decode worker is told to read them; when it has, the
lease is given back, and only if it had held until then is what was read used.
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import TracebackType
from typing import Protocol, Self

from msgspec.structs import replace

from trtserve.plugins.api import Finish, KVHandle, Placement, Request, WorkerId
from trtserve.server.errors import WorkerLost
from trtserve.server.workers.client import WorkerClient
from trtserve.server.workers.kv_messages import KVFetched

logger = logging.getLogger(__name__)

EXTEND_S = 5.0
"""Leases of live requests are extended so often, a sixth of what they last."""

_FETCH_DEADLINE_S = 35.0  # a worker ends its own reads within 30 s
_RELEASE_DEADLINE_S = 2.0


class HandOverListener(Protocol):
    """Who keeps the live hand-overs and counts what they moved (the cluster)."""

    def hand_over_began(self, hand_over: ServerHandOver) -> None: ...

    def hand_over_ended(self, hand_over: ServerHandOver) -> None: ...

    def fetched(self, fetch: KVFetched, is_valid: bool, waited_s: float) -> None: ...

    def client(self, worker_id: WorkerId) -> WorkerClient: ...


class ServerHandOver:
    """Implements `HandOver`. On the event loop; whoever enters it leaves it."""

    def __init__(self, request: Request, listener: HandOverListener) -> None:
        self._request = request
        self._listener = listener
        self._source: WorkerClient | None = None
        self._handles: list[KVHandle] = []
        self._published = asyncio.Event()
        self._target: WorkerClient | None = None
        self._is_fetching = False
        self._has_moved = False
        self.lease_id = 0  # held by `source`; 0: none
        self._keeper: WorkerClient | None = None  # whose engine may keep KV of this request, to move it itself
        self._kept: KVHandle | None = None  # what it keeps, until that is given

    async def __aenter__(self) -> Self:
        self._listener.hand_over_began(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.hand_over_ended(self)
        self._abort()
        self._drop_lease()
        self.take_back()

    @property
    def source(self) -> WorkerClient | None:
        """The worker that has the blocks."""
        return self._source

    def uses(self, client: WorkerClient) -> bool:
        """Whether that worker keeps blocks for it, or reads them."""
        gives = self._keeper is client or (self._source is client and self.lease_id != 0)
        return gives or (self._target is client and self._is_fetching)

    # -------------------------------------------------------------- the prefill worker's side

    def expect(self, source: WorkerClient) -> None:
        """The prompt is computed there now; what another worker published counts no longer."""
        self._abort()
        self._drop_lease()
        self.take_back()
        self._source, self._handles = source, []
        self._published.clear()
        self._keeper = source if source.moves_kv else None

    def prefilled(self, finish: Finish) -> None:
        """The run that was expected has ended."""
        if self._keeper is not None:
            self._kept = finish.kv_handle
            if self._kept is None:
                self._keeper = None

    def on_kv(self, handle: KVHandle) -> None:
        """A part of the prompt can be read."""
        self.lease_id = handle.lease_id
        self._handles.append(handle)
        self._published.set()
        if self._target is not None:
            self._fetch(handle)

    async def published(self) -> None:
        await self._published.wait()

    # -------------------------------------------------------------- the decode worker's side

    def begin(self, decode: Placement) -> None:
        target = self._listener.client(decode.worker_id)
        if target is self._target:
            return
        self._abort()
        self._target = target
        for handle in self._handles:
            self._fetch(handle)

    async def complete(self) -> bool:
        if self._keeper is not None:
            return self._kept is not None and self._keeper.keeps(self._kept)
        target, source, lease_id = self._target, self._source, self.lease_id
        if not lease_id and self._handles and self._handles[-1].is_final and not self._has_moved:
            return True  # a prompt without a full block: there is nothing to move
        is_whole = bool(self._handles) and self._handles[-1].is_final  # else the worker was lost on the way
        if target is None or source is None or not self._is_fetching or not lease_id or not is_whole:
            self._abort()
            return False
        begun_s = time.monotonic()
        try:
            fetch = await target.kv.fetched(self._request.id, _FETCH_DEADLINE_S)
        except TimeoutError:
            logger.warning("%s did not end its fetch of request %d", target.worker_id, self._request.id)
            self._abort()
            return False
        self.lease_id = 0
        self._has_moved = True
        is_valid = await self._release(source, lease_id) and fetch.ok
        self._is_fetching = False
        target.kv.commit(self._request.id, is_valid)
        self._listener.fetched(fetch, is_valid, time.monotonic() - begun_s)
        return is_valid

    # -------------------------------------------------------------- engines that move KV themselves

    def give(self, request: Request) -> Request:
        kept, self._kept = self._kept, None
        if kept is None or self._keeper is None or not self._keeper.keeps(kept):
            return request
        return replace(request, kv_handle=kept)

    def take_back(self) -> None:
        keeper, self._keeper, self._kept = self._keeper, None, None
        if keeper is not None:
            keeper.let_go_of_kv(self._request.id)

    def _fetch(self, handle: KVHandle) -> None:
        assert self._target is not None
        if not self.lease_id:
            return  # given back: its rows may hold anything by now
        try:
            self._target.kv.fetch(self._request, handle)
            self._is_fetching = True
        except WorkerLost:
            self._is_fetching = False  # `run` says so where it matters

    async def _release(self, source: WorkerClient, lease_id: int) -> bool:
        try:
            return await source.kv.release(lease_id, _RELEASE_DEADLINE_S)
        except WorkerLost:
            # What a worker had published before it died is whole, but nobody can say that its lease still held.
            return False

    def _abort(self) -> None:
        if self._is_fetching and self._target is not None:
            self._target.kv.abort(self._request.id)
        self._is_fetching = False
        self._target = None

    def _drop_lease(self) -> None:
        lease_id, self.lease_id = self.lease_id, 0
        if lease_id and self._source is not None:
            self._source.kv.drop(lease_id)
