"""What the next forward pass does: continuous batching with chunked prefill over paged KV.

Order is by arrival. Running sequences come first, those that decode before those in prefill; then waiting ones are
admitted while there is room. A sequence that needs a block when none is free takes it from the latest arrival,
which starts over later (its tokens are kept, its KV is computed again); the latest one itself waits.
"""

from __future__ import annotations

from collections import deque

from trtserve.plugins.api import RequestId
from trtserve.plugins.engines.torch.batch import Scheduled
from trtserve.plugins.engines.torch.prefix_cache import PrefixCache
from trtserve.plugins.engines.torch.sequence import Sequence


class Scheduler:
    """Owns every sequence from `add` to `finish`, and the holds on blocks of those that run."""

    def __init__(self, cache: PrefixCache, max_num_seqs: int, max_num_tokens: int) -> None:
        self._cache = cache
        self._pool = cache.pool
        self._max_num_seqs = max_num_seqs
        self._max_num_tokens = max_num_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by arrival
        self._sequences: dict[RequestId, Sequence] = {}
        self.preemptions_total = 0
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def has(self, request_id: RequestId) -> bool:
        """Whether this request waits or runs."""
        return request_id in self._sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the pool when alone (the engine has checked)."""
        self._sequences[sequence.request.id] = sequence
        self._waiting.append(sequence)

    def remove(self, request_id: RequestId) -> Sequence | None:
        """End a sequence in whatever state and give back its blocks; None if it is not here."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        if sequence.block_ids:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        return sequence

    def schedule(self) -> list[Scheduled]:
        """The next pass, at most `max_num_tokens` tokens; empty only if there is nothing to do at all."""
        work: dict[Sequence, int] = {}
        self._schedule_decodes(work)
        budget = self._max_num_tokens - len(work)
        budget = self._schedule_prefills(work, budget)
        self._admit(work, budget)
        return [Scheduled(sequence, count) for sequence, count in work.items()]

    def complete(self, work: list[Scheduled]) -> None:
        """The pass was run: its tokens have KV now, and blocks that became full are offered for reuse."""
        size = self._cache.block_size
        for item in work:
            sequence = item.sequence
            start = sequence.num_computed // size
            sequence.num_computed += item.count
            stop = sequence.num_computed // size
            self._cache.commit(sequence.chain, sequence.tokens, sequence.block_ids, start, stop)

    def _schedule_decodes(self, work: dict[Sequence, int]) -> None:
        for sequence in list(self._running):
            # one that was preempted a moment ago has no blocks and no place in this pass
            if sequence.num_pending == 1 and sequence.block_ids and self._grow(sequence):
                work[sequence] = 1

    def _schedule_prefills(self, work: dict[Sequence, int], budget: int) -> int:
        for sequence in self._running:
            if budget and sequence.num_pending > 1:
                work[sequence] = min(budget, sequence.num_pending)
                budget -= work[sequence]
        return budget

    def _admit(self, work: dict[Sequence, int], budget: int) -> None:
        while budget and self._waiting and len(self._running) < self._max_num_seqs:
            sequence = self._waiting[0]
            if not self._take_blocks(sequence):
                return
            self._running.append(self._waiting.popleft())
            self._count(sequence)
            work[sequence] = min(budget, sequence.num_pending)
            budget -= work[sequence]

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Allocate for all tokens known so far, so that only decodes ever run out of blocks.

        A block for each running sequence is left over: admitting into the last one would only lead to a preemption.
        """
        num_tokens = len(sequence.tokens)
        # at least one token has to go through the model to give logits
        found = self._cache.lookup(sequence.chain, sequence.tokens, num_tokens - 1)
        needed = -(-num_tokens // self._cache.block_size) - len(found)
        if needed + self._pool.num_idle(found) + len(self._running) > self._pool.num_free:
            return False
        self._pool.acquire(found)
        sequence.block_ids = found + self._pool.allocate(needed)
        sequence.num_computed = len(found) * self._cache.block_size
        return True

    def _count(self, sequence: Sequence) -> None:
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self.cached_tokens_total += sequence.cached_tokens
            self.prompt_tokens_total += len(sequence.request.prompt)

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure that the next token has a slot, at the cost of later arrivals if need be."""
        if sequence.num_computed < len(sequence.block_ids) * self._cache.block_size:
            return True
        while not self._pool.num_free:
            if self._running[-1] is sequence:
                return False
            self._preempt(self._running.pop())
        sequence.block_ids += self._pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions_total += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
