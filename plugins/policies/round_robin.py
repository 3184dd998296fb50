"""Each request to the next worker with room, in turn."""

from __future__ import annotations

from collections.abc import Sequence

from trtserve.plugins.api import WorkerId
from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.routing_api import (
    Assignment,
    HeldRequest,
    Plan,
    PolicyConfig,
    RoutingPolicy,
    RoutingState,
)


class RoundRobin:
    """Each request to the next worker in turn that has a free slot."""

    uses_prefixes = False

    def __init__(self) -> None:
        self._last: WorkerId = WorkerId("")

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        # Turns go by id, so that they stay fair while workers come and go.
        order = sorted(state.workers, key=lambda view: (view.worker_id <= self._last, view.worker_id))
        room = {view.worker_id: view.free_slots for view in order}
        assignments = []
        for waiting in held:
            worker_id = next((candidate for candidate, free in room.items() if free > 0), None)
            if worker_id is None:
                break
            room[worker_id] = room.pop(worker_id) - 1  # to the end of the line
            self._last = worker_id
            assignments.append(Assignment(waiting.request.id, worker_id))
        return Plan(assignments)


@hookimpl
def make_policy(name: str, config: PolicyConfig) -> RoutingPolicy | None:
    return RoundRobin() if name == "round_robin" else None
