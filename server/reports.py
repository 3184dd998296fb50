"""What workers report, in the router's terms, and the router's view of which workers there are.

A worker's warm-up runs before it is ready, and so before the router knows it; what it says then is kept until it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from trtserve.plugins.api import PassStats, Role, WorkerId
from trtserve.server.kv_peers import KVPeers
from trtserve.server.router.feed import Change
from trtserve.server.router.router import Router
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient, WorkerState

_MOST_EARLY_REPORTS = 4096
"""A warm-up takes some dozen passes. Of more, the newest count; the index notices by their numbers and asks again."""

_Report: TypeAlias = tuple[int, tuple[Change, ...]] | PassStats


class WorkerReports:
    """Implements `PoolListener` for the router."""

    def __init__(
        self, router: Router, capacity_changed: Callable[[], None], warm_pairs: Callable[[WorkerClient], None]
    ) -> None:
        """`capacity_changed` is called when a worker has come or gone, `warm_pairs` before the router places anything
        on one that came."""
        self._router = router
        self._warm_pairs = warm_pairs
        self._capacity_changed = capacity_changed
        self._peers = KVPeers()
        self._early: dict[WorkerId, deque[tuple[int, _Report]]] = {}  # by worker, with the rank

    # -------------------------------------------------------------- workers come and go

    def worker_connected(self, client: WorkerClient) -> None:
        """A new incarnation begins."""
        self._early[client.worker_id] = deque(maxlen=_MOST_EARLY_REPORTS)

    def worker_ready(self, client: WorkerClient) -> None:
        """Its engine runs: the router may use it, knowing all that it said so far."""
        assert client.info is not None
        router, routed = self._router, client.routed_ids
        for routed_id in routed:
            router.add_worker(routed_id, client.role, client.info)
        for rank, report in self._early.pop(client.worker_id, ()):
            if rank >= len(routed):
                continue
            if isinstance(report, PassStats):
                router.learn(routed[rank], report)
            else:
                router.events(routed[rank], *report)
        self._peers.ready(client)
        self._warm_pairs(client)
        self._capacity_changed()
        router.plan(client.role)

    def worker_gone(self, client: WorkerClient) -> None:
        """Its bookings end as its requests fail."""
        for routed_id in client.routed_ids:
            self._router.remove_worker(routed_id)
        self._peers.gone(client)
        self._capacity_changed()

    def worker_relabelled(self, client: WorkerClient, former: Role) -> None:
        """It was drained before; its index, its load and its connection stay as they are."""
        for routed_id in client.routed_ids:
            self._router.relabel(routed_id, client.role)
        self._peers.relabelled(client, former)
        self._capacity_changed()
        self._router.plan(client.role)

    # -------------------------------------------------------------- StepListener

    def on_step(self, client: WorkerClient, step: wire.Step) -> None:
        """In the order that `RoutingCore` wants."""
        first_event = step.first_event
        changes = tuple(map(_change_of, step.events)) if step.events else ()
        if client.state is not WorkerState.READY:
            self._keep(client, step, changes)
            return
        router, routed_id = self._router, client.routed_ids[step.rank]
        if changes:
            router.events(routed_id, first_event, changes)
        for detail in step.details:
            if detail.cached_tokens is not None:
                router.prompt_done(routed_id, detail.request_id, detail.cached_tokens)
        # The number of the next event shows whether some were lost.
        next_event = first_event + len(changes)
        router.pass_ended(routed_id, step.stats, step.load, step.num_tokens, step.num_rows, next_event)

    def on_blocks(self, client: WorkerClient, blocks: wire.Blocks) -> None:
        self._router.snapshot(client.routed_ids[blocks.rank], blocks.next_event, wire.hashes_of(blocks.hashes))

    def _keep(self, client: WorkerClient, step: wire.Step, changes: tuple[Change, ...]) -> None:
        early = self._early.get(client.worker_id)
        if early is None:
            return
        if changes:
            early.append((step.rank, (step.first_event, changes)))
        if step.stats is not None:
            early.append((step.rank, step.stats))


def _change_of(event: wire.WireEvent) -> Change:
    match event:
        case wire.Stored():
            return "stored", wire.hashes_of(event.hashes)
        case wire.Removed():
            return "removed", wire.hashes_of(event.hashes)
        case wire.Cleared():
            return "cleared", ()
