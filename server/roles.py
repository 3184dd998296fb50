"""Another role for a worker while the server runs: it is drained, and is then what it was told to be.

Roles are labels. A worker with a KV port can both give and take KV, so its process goes on as it is; only the server's
own view changes: pool, router, who may read from whom, and the command that starts its next process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from trtserve.plugins.api import Role, WorkerId
from trtserve.server.cluster import ServerCluster
from trtserve.server.errors import Conflict, InvalidRequest, NotFound, Overloaded
from trtserve.server.workers.client import WorkerClient, WorkerState

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
"""Between two looks at a worker that is being drained. It is idle when the last of its requests, bookings, leases and
fetches is over, which many parts of the server would else have to tell of, for an act of an operator."""


class RoleChanges:
    """At most one for each worker at a time. On the event loop."""

    def __init__(
        self,
        cluster: ServerCluster,
        mode_name: str,
        roles: Collection[Role],
        drain_s: float,
        is_ending: Callable[[], bool],
    ) -> None:
        """roles: those that the mode has. drain_s: seconds that a worker gets by default. is_ending: the server drains
        itself."""
        self._cluster = cluster
        self._mode_name = mode_name
        self._roles = roles
        self._drain_s = drain_s
        self._is_ending = is_ending
        self._draining: set[WorkerId] = set()

    def is_draining(self, worker_id: WorkerId) -> bool:
        return worker_id in self._draining

    async def change(self, worker_id: WorkerId, role: Role, drain_s: float | None = None, force: bool = False) -> Role:
        """Returns the former role when the worker has the new one; at once where that is the same.

        force: also where no other ready worker has the former role; who waits for that role gets 503 then. Raises
        NotFound, InvalidRequest, Conflict, and Overloaded where the server ends meanwhile. After an error the worker
        is what it was, and takes requests again. Cancelling the call does the same.
        """
        client = self._client(worker_id)
        former = client.role
        if role is former and worker_id not in self._draining:
            return former
        self._check(client, role, force)
        self._draining.add(worker_id)
        self._cluster.drain(client, True)
        try:
            await self._drained(client, self._drain_s if drain_s is None else drain_s)
            self._check_not_last(client, force)  # the others may have died meanwhile
            self._cluster.pool.relabel(client, role)
        finally:
            self._draining.discard(worker_id)
            self._cluster.drain(client, False)
        logger.info("%s: was a %s worker and is a %s worker now", worker_id, former, role)
        return former

    # -------------------------------------------------------------- what is in the way

    def _client(self, worker_id: WorkerId) -> WorkerClient:
        try:
            return self._cluster.pool[worker_id]
        except KeyError:
            raise NotFound(f"There is no worker {worker_id[:200]!r}; GET /v1/workers lists them.") from None

    def _check(self, client: WorkerClient, role: Role, force: bool) -> None:
        if len(self._roles) < 2:
            raise Conflict(f"In mode {self._mode_name} all workers have one role.", code="one_role")
        if role not in self._roles:
            names = " or ".join(self._roles)
            raise InvalidRequest(f"Mode {self._mode_name} has no {role} workers; send {names}.", param="role")
        if client.worker_id in self._draining:
            raise Conflict(f"{client.worker_id} is being drained for another role already.", code="draining_already")
        if client.state is not WorkerState.READY:
            raise Conflict(f"{client.worker_id} is not ready: {client.phase}.", code="worker_not_ready")
        if client.moves_kv:
            text = f"{client.worker_id} has an engine that was set up for the role {client.role}; it cannot change it."
            raise Conflict(text, code="no_kv")
        if client.kv.port is None:
            raise Conflict(f"{client.worker_id} cannot give or take KV, so it cannot change roles.", code="no_kv")
        self._check_not_last(client, force)

    def _check_not_last(self, client: WorkerClient, force: bool) -> None:
        others = (
            other
            for other in self._cluster.pool
            if other is not client and other.role is client.role and other.state is WorkerState.READY
        )
        if not force and not any(other.worker_id not in self._draining for other in others):
            raise Conflict(
                f"{client.worker_id} is the last ready {client.role} worker; send force: true to do without.",
                code="last_of_its_role",
            )

    # -------------------------------------------------------------- draining

    async def _drained(self, client: WorkerClient, drain_s: float) -> None:
        """Return when nothing is booked on the worker, runs there, or moves from or to it."""
        deadline_s = asyncio.get_running_loop().time() + drain_s
        incarnation = client.kv.incarnation
        while self._cluster.is_in_use(client):
            if self._is_ending():
                raise Overloaded("the server is shutting down", code="draining", retry_after_s=5.0)
            if asyncio.get_running_loop().time() >= deadline_s:
                raise Conflict(
                    f"{client.worker_id} was not idle within {drain_s:g} s: {client.num_running} sequences run there. "
                    "It stays what it is; try again with a longer drain_timeout_s.",
                    code="drain_timeout",
                )
            await asyncio.sleep(_LOOK_S)
        if client.state is not WorkerState.READY or client.kv.incarnation != incarnation:
            raise Conflict(f"{client.worker_id} was lost while it was drained: {client.phase}", code="worker_not_ready")
