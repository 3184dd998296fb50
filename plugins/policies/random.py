"""Each request to any worker with room, all alike likely."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.routing_api import (
    Assignment,
    HeldRequest,
    Plan,
    PolicyConfig,
    RoutingPolicy,
    RoutingState,
)


class RandomChoice:
    """Each request to any worker with a free slot, drawn by the seed."""

    uses_prefixes = False

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        room = {view.worker_id: view.free_slots for view in state.workers if view.free_slots > 0}
        assignments = []
        for waiting in held:
            if not room:
                break
            worker_id = self._random.choice(list(room))
            room[worker_id] -= 1
            if not room[worker_id]:
                del room[worker_id]
            assignments.append(Assignment(waiting.request.id, worker_id))
        return Plan(assignments)


@hookimpl
def make_policy(name: str, config: PolicyConfig) -> RoutingPolicy | None:
    return RandomChoice(config.seed) if name == "random" else None
