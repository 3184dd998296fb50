"""Who goes where now, by the cost of `cost.py`: at arrival, or held back until the worker can begin.

`kv` plans all held requests at once, the one that will be served last first: whoever is planned later pays for the time
by which it puts the others off, so short prompts find a worker where nobody long waits behind them. Each worker then
serves its own, the shortest first, and only those that its very next pass can take well are sent; the rest stay in the
queue and are planned anew.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import msgspec

from trtserve.plugins.api import RequestId, Role, WorkerId
from trtserve.plugins.policies.kv.cost import PassCosts, PlannedPrompt, PlannedWorker, Weights
from trtserve.plugins.policies.kv.options import KVOptions
from trtserve.plugins.routing_api import LONG_AGO_S, Assignment, HeldRequest, Plan, RoutingState, WorkerView

_AT_LATEST_S = 0.05
"""Ask again after this where no pass is known whose end could be waited for. Sequences and KV space that become free
are told by the requests that end, so this only guards against estimates that are wrong."""

_MOST_PAIRS = 512
"""Of held request and worker that one decision weighs, at a microsecond or two each; with many workers fewer requests
are planned at once, but never less than `_LEAST_WINDOW`."""

_LEAST_WINDOW = 4

_CLOSE_SHARE = 0.5
_SHARE_OF_LAST = 64  # requests

_LEAST_PATIENCE_MS = 1.0
"""A shorter wait for others of the same moment costs more than it brings."""


class _Candidate(msgspec.Struct):
    """A held request in one decision."""

    waiting: HeldRequest
    overlaps: Mapping[int, int]
    passes: PassCosts  # of workers such as `least` is for
    most: int  # leading blocks that any worker has
    least: PlannedPrompt  # on the worker that has most of it
    rank_ms: float  # the least are served first
    prompt: PlannedPrompt  # on the worker that it is planned on
    cost_ms: float = 0.0


class Arrivals:
    """Whether requests tend to come several at a time, so that it pays to wait a little for the others."""

    def __init__(self, close_s: float) -> None:
        """close_s: requests that come within so long of each other are of one moment."""
        self._close_s = close_s
        self._share = 0.5  # of requests that came so close behind another one, over the last ones
        self._last = (LONG_AGO_S, -1)

    @property
    def are_close(self) -> bool:
        return self._share >= _CLOSE_SHARE

    def see(self, held: Sequence[HeldRequest]) -> None:
        """Those that are new count; `held` is in order of arrival."""
        for waiting in held[bisect_right(held, self._last, key=_arrival) :]:
            is_close = waiting.held_since_s - self._last[0] <= self._close_s
            self._share += (is_close - self._share) / _SHARE_OF_LAST
            self._last = _arrival(waiting)


def _arrival(waiting: HeldRequest) -> tuple[float, int]:
    return waiting.held_since_s, waiting.request.id


class KVPolicy:
    """`holds`: as described above. Without it every request is sent at once, each to its cheapest worker."""

    uses_prefixes = True

    def __init__(self, options: KVOptions, holds: bool) -> None:
        self._options = options
        self._holds = holds
        self._arrivals = Arrivals(options.gather_ms / 1000)
        # By role: the first in order, and the worker whose KV space it waits for.
        self._waits_for: dict[Role, tuple[RequestId, WorkerId]] = {}

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        if len(held) == 1 == len(state.workers) and (alone := self._alone(held, state.workers[0])) is not None:
            return Plan((alone,))
        workers = self._workers(state)
        if not self._holds:
            window = self._window(len(workers))
            sent = self._at_once(held[:window], workers, state)
            return Plan(sent, state.now_s if len(sent) == window < len(held) else None)
        if not any(worker.is_open for worker in workers):
            return Plan((), self._again_at_s(workers, state.now_s, ()))
        self._arrivals.see(held)
        candidates = self._in_order(held, workers[0].passes, state)
        plans = self._plans(candidates, workers, state.estimates.output_tokens)
        sent = []
        due_s = []
        for worker, plan in zip(workers, plans, strict=True):
            if plan and worker.is_open:
                due_s.append(self._send(worker, plan, candidates[0], state.now_s, sent))
        if len(sent) == len(held):
            return Plan(sent)
        return Plan(sent, self._again_at_s(workers, state.now_s, [one for one in due_s if one is not None]))

    def _alone(self, held: Sequence[HeldRequest], worker: WorkerView) -> Assignment | None:
        """For the only request where the only worker has nothing to do: no other place to weigh, nobody to hold it back
        for but those of its moment. Its cost is its prefill then. None where all has to be weighed after all."""
        if worker.booked_requests or worker.is_prefilling or worker.free_slots <= 0:
            return None
        (waiting,) = held
        length, size = len(waiting.request.prompt), worker.info.block_size
        if length > worker.info.max_num_tokens:
            return None
        computable = (length - 1) // size
        reused = computable if waiting.moves_kv else min(waiting.overlaps().get(worker.slot, 0), computable)
        prefill_ms = worker.pass_times.prefill_ms(length - reused * size)
        if self._holds:
            self._arrivals.see(held)
            if self._arrivals.are_close and self._options.gather_share * prefill_ms >= _LEAST_PATIENCE_MS:
                return None
        return Assignment(waiting.request.id, worker.worker_id, prefill_ms)

    def _workers(self, state: RoutingState) -> list[PlannedWorker]:
        weights = Weights.of(self._options, state.estimates)
        known: dict[tuple[int, int], PassCosts] = {}
        workers = []
        for view in state.workers:
            key = id(view.pass_times), id(view.info)
            passes = known.get(key)
            if passes is None:
                passes = known[key] = PassCosts(view, self._options.reuse_weight * state.estimates.reuse_probability)
            workers.append(PlannedWorker(view, passes, state.now_s, weights))
        return workers

    # -------------------------------------------------------------- who is planned

    def _in_order(self, held: Sequence[HeldRequest], passes: PassCosts, state: RoutingState) -> list[_Candidate]:
        """Those to plan now, in the order of being served: shortest prefill first, counting the time that it has waited
        already, so that nobody starves. `passes`: any worker's; all are taken to be equally fast here."""
        window = self._window(len(state.workers))
        if len(held) > window:
            # As if nothing were cached anywhere, which costs no look into the index.
            ranks = [self._rank_ms(one, passes.of(len(one.request.prompt))[0], state.now_s) for one in held]
            held = [held[place] for place in sorted(range(len(held)), key=ranks.__getitem__)[:window]]
        candidates = [self._candidate(waiting, passes, state) for waiting in held]
        if len(candidates) > 1:
            candidates.sort(key=lambda candidate: (candidate.rank_ms, candidate.waiting.request.id))
        return candidates

    def _window(self, num_workers: int) -> int:
        return min(self._options.window, max(_LEAST_WINDOW, _MOST_PAIRS // num_workers))

    def _candidate(self, waiting: HeldRequest, passes: PassCosts, state: RoutingState) -> _Candidate:
        overlaps, length = waiting.overlaps(), len(waiting.request.prompt)
        most = max(overlaps.values()) if overlaps else 0
        least = passes.prompt(length, most, state.estimates.output_tokens, waiting.moves_kv)
        rank_ms = self._rank_ms(waiting, least.prefill_ms, state.now_s)
        return _Candidate(waiting, overlaps, passes, most, least, rank_ms, least)

    def _due_s(self, candidate: _Candidate) -> float:
        """Until then it waits for others of its moment, where requests tend to come so."""
        options, since_s = self._options, candidate.waiting.held_since_s
        patience_ms = min(options.gather_ms, options.gather_share * candidate.least.prefill_ms)
        return since_s + (patience_ms / 1000 if patience_ms >= _LEAST_PATIENCE_MS else 0.0)

    def _rank_ms(self, waiting: HeldRequest, prefill_ms: float, now_s: float) -> float:
        return prefill_ms - self._options.age_weight * (now_s - waiting.held_since_s) * 1000

    # -------------------------------------------------------------- where

    def _plans(
        self, candidates: Sequence[_Candidate], workers: Sequence[PlannedWorker], output_tokens: float
    ) -> list[list[_Candidate]]:
        """What each worker is to serve, in order."""
        plans: list[list[_Candidate]] = [[] for _ in workers]
        kept = self._waits_for.get(candidates[0].waiting.role) if candidates else None
        for candidate in reversed(candidates):
            chosen = workers
            if kept is not None and candidate.waiting.request.id == kept[0]:
                chosen = [worker for worker in workers if worker.view.worker_id == kept[1]] or workers
            worker = chosen[self._cheapest(candidate, chosen, output_tokens)]
            plans[workers.index(worker)].append(candidate)
            worker.add(candidate.prompt)
        return [plan[::-1] for plan in plans]

    def _cheapest(self, candidate: _Candidate, workers: Sequence[PlannedWorker], output_tokens: float) -> int:
        """The place of its worker; notes what it is and costs there."""
        overlaps, others = candidate.overlaps, self._options.others_weight
        length, moves_kv = candidate.least.length, candidate.waiting.moves_kv
        # By overlap, on workers like the last one.
        known, prompts = candidate.passes, {candidate.most: candidate.least}
        best, best_ms = 0, float("inf")
        for place, worker in enumerate(workers):
            if worker.passes is not known:
                known, prompts = worker.passes, {}
            overlap = overlaps.get(worker.view.slot, 0) if overlaps else 0
            prompt = prompts.get(overlap)
            if prompt is None:
                prompt = prompts[overlap] = known.prompt(length, overlap, output_tokens, moves_kv)
            total_ms = worker.cost_ms(prompt, others)
            if total_ms < best_ms:
                best, best_ms, candidate.prompt = place, total_ms, prompt
        candidate.cost_ms = best_ms
        return best

    # -------------------------------------------------------------- when

    def _send(
        self,
        worker: PlannedWorker,
        plan: Sequence[_Candidate],
        first: _Candidate,
        now_s: float,
        sent: list[Assignment],
    ) -> float | None:
        """Send what the worker's next pass is to take, in order, until one had better come later. Returns when to look
        again at one that waits for others of its moment. `first`: of all candidates."""
        view = worker.view
        tokens, prompts, free_blocks, free_slots = worker.tokens, worker.prompts, view.free_blocks, worker.free_slots
        for place, candidate in enumerate(plan):
            prompt = candidate.prompt
            if tokens and not self._joins(worker, tokens, prompts, prompt.new, len(plan) - place - 1):
                return None
            if prompt.needed_blocks > free_blocks and view.booked_requests + place:
                # It would wait there for KV space, and could not go elsewhere any more. The first of all stays with its
                # worker, which sends nothing else before it: smaller ones would take the space for ever.
                if candidate is first:
                    self._waits_for[view.role] = candidate.waiting.request.id, view.worker_id
                return None
            if self._arrivals.are_close and now_s < (due_s := self._due_s(candidate)):
                return due_s
            sent.append(Assignment(candidate.waiting.request.id, view.worker_id, candidate.cost_ms))
            tokens += prompt.new
            prompts += 1
            free_blocks -= prompt.needed_blocks
            free_slots -= 1
            if tokens >= worker.passes.budget or free_slots <= 0:
                return None
        return None

    def _joins(self, worker: PlannedWorker, tokens: int, prompts: int, new: int, behind: int) -> bool:
        """Whether a prompt had better join a pass with so many tokens of so many prompts than come in a pass of its own
        after it; `behind`: others that wait for both."""
        passes, decode_ms, together = worker.passes, worker.decode_ms, tokens + new
        others = 2 * self._options.others_weight * prompts
        one_ms = passes.prefill_ms(tokens)
        if together <= passes.budget:
            grown_ms = passes.prefill_ms(together) - one_ms
            saved_ms = passes.prefill_ms(new) + decode_ms - grown_ms
            return others * grown_ms <= (1 + behind + worker.worth(worker.decoding)) * saved_ms
        stalled = worker.worth(worker.decoding)
        join_ms = (1 + stalled) * passes.with_decodes_ms(together, decode_ms) + others * (passes.full_ms - one_ms)
        alone_ms = passes.with_decodes_ms(new, decode_ms)
        apart_ms = (1 + stalled) * (one_ms + decode_ms)
        apart_ms += (1 + worker.worth(worker.decoding + prompts)) * alone_ms
        return join_ms <= apart_ms

    def _again_at_s(self, workers: Sequence[PlannedWorker], now_s: float, due_s: Sequence[float]) -> float:
        """When the next pass with prompts is about to end, or a request has waited for others of its moment. The router
        also asks when a pass has ended."""
        lead_s = self._options.lead_ms / 1000
        ends = [
            worker.view.pass_ends_s
            for worker in workers
            if worker.view.pass_ends_s > now_s and (worker.view.is_prefilling or worker.view.queued_tokens)
        ]
        early = [end_s - lead_s for end_s in ends if end_s - lead_s > now_s]
        return min([*(early or ends), *due_s], default=now_s + _AT_LATEST_S)

    # -------------------------------------------------------------- at arrival

    def _at_once(
        self, held: Sequence[HeldRequest], workers: Sequence[PlannedWorker], state: RoutingState
    ) -> list[Assignment]:
        sent = []
        for waiting in held:
            open_workers = [worker for worker in workers if worker.free_slots > 0]
            if not open_workers:
                break
            candidate = self._candidate(waiting, open_workers[0].passes, state)
            worker = open_workers[self._cheapest(candidate, open_workers, state.estimates.output_tokens)]
            sent.append(Assignment(waiting.request.id, worker.view.worker_id, candidate.cost_ms))
            worker.send(candidate.prompt)
        return sent
