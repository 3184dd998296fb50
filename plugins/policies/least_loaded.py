"""Each request to the worker with the fewest booked tokens: prompt and longest possible output of what it runs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from trtserve.plugins.hooks import hookimpl
from trtserve.plugins.routing_api import (
    Assignment,
    HeldRequest,
    Plan,
    PolicyConfig,
    RoutingPolicy,
    RoutingState,
)


class LeastLoaded:
    """Exact load, since bookings are exact; ties go to the lowest worker id."""

    uses_prefixes = False

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        heap = [(view.booked_tokens, view.worker_id, view.free_slots) for view in state.workers if view.free_slots > 0]
        heapq.heapify(heap)
        assignments = []
        for waiting in held:
            if not heap:
                break
            tokens, worker_id, free = heapq.heappop(heap)
            assignments.append(Assignment(waiting.request.id, worker_id))
            if free > 1:
                request = waiting.request
                more = len(request.prompt) + request.sampling.max_tokens
                heapq.heappush(heap, (tokens + more, worker_id, free - 1))
        return Plan(assignments)


@hookimpl
def make_policy(name: str, config: PolicyConfig) -> RoutingPolicy | None:
    return LeastLoaded() if name == "least_loaded" else None
