"""Who goes where now, by the cost of `cost.py`: at arrival, or held back until the worker can begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from trtserve.plugins.policies.kv.cost import PassCosts, PlannedWorker, cost_ms
from trtserve.plugins.policies.kv.options import KVOptions
from trtserve.plugins.routing_api import Assignment, HeldRequest, Plan, RoutingState

_SOON_S = 1e-3
"""Ask again after this where no pass is known whose end could be waited for."""


class KVPolicy:
    """`holds`: a request is sent only into the very next pass of its worker, when that is about to begin, so a short
    prompt shares no pass with a long one that came before it, and a request goes to whoever is free first. Until then
    it stays in the queue and is planned anew. Without it every request is sent at once."""

    uses_prefixes = True

    def __init__(self, options: KVOptions, holds: bool) -> None:
        self._options = options
        self._holds = holds

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        workers = self._workers(state)
        assignments: list[Assignment] = []
        if not self._holds or any(worker.is_open for worker in workers):
            for waiting, overlaps in self._in_order(held[: self._options.window], workers, state.now_s):
                self._place(waiting, overlaps, workers, state, assignments)
        left = len(held) - len(assignments)
        return Plan(assignments, self._again_at_s(workers, state.now_s) if left and self._holds else None)

    def _workers(self, state: RoutingState) -> list[PlannedWorker]:
        known: dict[tuple[int, int], PassCosts] = {}
        workers = []
        for view in state.workers:
            key = id(view.pass_times), view.info.max_num_tokens
            passes = known.get(key)
            if passes is None:
                passes = known[key] = PassCosts(view.pass_times, view.info.max_num_tokens)
            workers.append(PlannedWorker(view, passes, state.now_s, state.estimates, self._options))
        return workers

    def _in_order(
        self, held: Sequence[HeldRequest], workers: Sequence[PlannedWorker], now_s: float
    ) -> Iterable[tuple[HeldRequest, Mapping[int, int]]]:
        """Shortest prefill first, counting the time that it has waited already: nobody starves."""
        if len(held) == 1:
            return [(held[0], held[0].overlaps())]
        first = workers[0]
        rows = []
        for place, waiting in enumerate(held):
            overlaps = waiting.overlaps()
            length = len(waiting.request.prompt)
            best = max(overlaps.values(), default=0)
            least_ms, _ = first.passes.of(length - min(best, (length - 1) // first.block_size) * first.block_size)
            waited_ms = (now_s - waiting.held_since_s) * 1000
            rows.append((least_ms - self._options.age_weight * waited_ms, place, waiting, overlaps))
        rows.sort(key=lambda row: row[:2])
        return [row[2:] for row in rows]

    def _place(
        self,
        waiting: HeldRequest,
        overlaps: Mapping[int, int],
        workers: Sequence[PlannedWorker],
        state: RoutingState,
        assignments: list[Assignment],
    ) -> None:
        """Plan one request on its cheapest worker, and send it if it is time."""
        length, output_tokens = len(waiting.request.prompt), state.estimates.output_tokens
        others, holds = self._options.others_weight, self._holds
        best, best_ms, best_joins, best_new = None, float("inf"), False, 0
        for worker in workers:
            if worker.free_slots <= 0:
                continue
            size = worker.block_size
            overlap = overlaps.get(worker.view.slot, 0)
            new = length - min(overlap, (length - 1) // size) * size if overlap else length
            total_ms, joins = cost_ms(worker, length, new, output_tokens, others, holds)
            if total_ms < best_ms:
                best, best_ms, best_joins, best_new = worker, total_ms, joins, new
        if best is None:
            return
        if not holds or (best_joins and best.is_open):
            assignments.append(Assignment(waiting.request.id, best.view.worker_id, best_ms))
            best.free_slots -= 1
        best.add(best_new, best_joins)

    def _again_at_s(self, workers: Sequence[PlannedWorker], now_s: float) -> float:
        """When the next pass with prompts is about to end; the router also asks when it has ended."""
        lead_s = self._options.lead_ms / 1000
        ends = [
            worker.view.pass_ends_s
            for worker in workers
            if worker.view.pass_ends_s > now_s and (worker.view.is_prefilling or worker.view.queued_tokens)
        ]
        early = [end_s - lead_s for end_s in ends if end_s - lead_s > now_s]
        return min(early or ends or [now_s + _SOON_S])
