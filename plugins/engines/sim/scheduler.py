"""The simulated engine's scheduler: which sequences a pass works on, and what the pass gives.

It has no clock. Whoever drives it, a real-time engine or a replay in virtual time, calls `run_pass` when a pass may
begin and counts `stats.duration_s` of what it returns until the next one; what was added meanwhile takes part in that.

The rules of a pass, with a budget of `max_num_tokens`:

1. Running sequences in order of admission: one that decodes takes 1 token (1 + drafts when it speculates), one whose
   prompt is unfinished takes what is left. If the blocks run out, the sequence admitted last gives up its blocks and
   waits again, ahead of all others, and this pass admits nobody.
2. Waiting sequences first in, first out, while budget and `max_num_seqs` last. One is admitted only if the blocks of
   its whole prompt, beside those it finds in the prefix cache, are free or evictable; none overtakes another.
3. A block of tokens is reusable as soon as the pass that fills it is scheduled, so a sequence admitted later in the
   same pass finds it. At most prompt - 1 tokens are reused: something has to be computed.
4. A sequence whose every token is computed gets its next one at the end of the pass.
5. One that ended gives its blocks back, the last block first.

Most passes do nothing but decode, and change nothing but counts. A replay, which has millions of them, asks for their
durations with `plan_decodes` and runs those that it needs at once with `run_decodes`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from msgspec.structs import replace

from trtserve.plugins.api import (
    FinishReason,
    Output,
    PassStats,
    Request,
    RequestId,
    RequestRefused,
    StepOutputs,
    WorkerLoad,
)
from trtserve.plugins.engines.sim.batch import Batch
from trtserve.plugins.engines.sim.limits import SchedulerLimits
from trtserve.plugins.engines.sim.pool import BlockPool
from trtserve.plugins.engines.sim.sequence import Sequence
from trtserve.plugins.engines.sim.speculation import Speculation
from trtserve.plugins.engines.sim.timing import PassTiming
from trtserve.plugins.engines.sim.tokens import TokenSource


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Sequences, blocks and passes of one simulated worker. `running`, `waiting` and `pool` are for reading only."""

    def __init__(
        self,
        limits: SchedulerLimits,
        timing: PassTiming,
        tokens: TokenSource,
        speculation: Speculation | None = None,
    ) -> None:
        self.limits = limits
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self._timing = timing
        self._capacity_tokens = limits.num_blocks * limits.block_size
        self._tokens = tokens
        self._speculation = speculation
        self._sequences: dict[RequestId, Sequence] = {}
        self._ended_early: list[Output] = []
        self._counters = _Counters()

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestRefused if its prompt leaves no room for a token."""
        length, limit = len(request.prompt), self.limits.max_seq_len
        if not 0 < length < limit:
            raise RequestRefused(
                f"The prompt has {length} tokens; this engine takes 1 to {limit - 1}, one less than its longest"
                f" sequence of {limit}: shorten the prompt or raise max_seq_len."
            )
        if not 0 <= request.num_resumed < length:
            raise RequestRefused(
                f"The request resumes after {request.num_resumed} generated tokens, but its prompt has {length} with"
                " them: one at least has to be there before."
            )
        stream = self._tokens.stream(request)
        reuse = self.limits.enable_prefix_caching
        sequence = Sequence(request, stream, self.limits.block_size, limit, reuse)
        self._sequences[request.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: RequestId) -> None:
        """End a request at once; the next pass reports it cancelled. Unknown ids are ignored."""
        self._end_early(Output(request_id, finish_reason=FinishReason.CANCELLED))

    def fail(self, request_id: RequestId, error: str) -> None:
        """End a request at once; the next pass reports the error. Unknown ids are ignored."""
        self._end_early(Output(request_id, finish_reason=FinishReason.ERROR, error=error))

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._ended_early or self.pool.has_events)

    def num_generated(self, request_id: RequestId) -> int | None:
        """Tokens that a live request has got so far, on other workers too; None for any other."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.request.num_resumed + len(sequence.generated)

    def run_pass(self) -> StepOutputs:
        """One pass. `stats` says how long it takes; it is None if there was only an early end to report."""
        batch = Batch(self.limits.max_num_tokens)
        self._schedule_running(batch)
        if not batch.has_preempted:
            self._admit_waiting(batch)
        outputs, self._ended_early = self._ended_early, []
        outputs += self._finish_pass(batch)
        return StepOutputs(
            outputs, self.load(), self.pool.take_events(), batch.stats(self._timing, self._capacity_tokens)
        )

    def plan_decodes(self, most: int) -> list[float]:
        """The durations in seconds of the next passes, at most `most`, that do nothing but decode: no sequence waits,
        begins or completes a block, or may end but for its length, which the last of them may reach. None of them
        if the next pass is another one. They hold until something is added or aborted."""
        running = self.running
        if not running or self.waiting or self._ended_early or self._speculation or self.pool.has_events:
            return []
        for sequence in running:
            most = min(most, sequence.decodes_ahead())
            if most <= 0:
                return []
        first = sum(sequence.num_tokens for sequence in running)
        contexts = range(first, first + most * len(running), len(running))
        return [self._timing.decode_s(context, self._capacity_tokens) for context in contexts]

    def run_decodes(self, count: int) -> StepOutputs:
        """The first `count` passes that `plan_decodes` gave, at once. What `run_pass` would give in as many calls, the
        tokens of each request in one output; load and stats are the last pass's."""
        running = self.running
        outputs = [sequence.decode(count) for sequence in running]
        context_tokens = sum(sequence.num_computed for sequence in running)
        duration_s = self._timing.decode_s(context_tokens, self._capacity_tokens)
        stats = PassStats(duration_s, 0, len(running), context_tokens)
        self._counters.generated_tokens += count * len(running)
        self._remove_ended([s for s, output in zip(running, outputs, strict=True) if output.finish_reason is not None])
        return StepOutputs(outputs, self.load(), self.pool.take_events(), stats)

    def load(self) -> WorkerLoad:
        counters = self._counters
        return WorkerLoad(
            running=len(self.running),
            waiting=len(self.waiting),
            free_blocks=self.pool.num_free,
            prompt_tokens_total=counters.prompt_tokens,
            cached_tokens_total=counters.cached_tokens,
            generated_tokens_total=counters.generated_tokens,
            preemptions_total=counters.preemptions,
            drafted_tokens_total=counters.drafted_tokens,
            accepted_tokens_total=counters.accepted_tokens,
        )

    def _schedule_running(self, batch: Batch) -> None:
        running, block_size, is_plain = self.running, self.limits.block_size, self._speculation is None
        place = 0
        while place < len(running) and batch.budget > 0:
            sequence = running[place]
            end = sequence.num_tokens
            # A short way for nearly all there is to do: a decode that neither begins nor completes a block.
            if is_plain and end - sequence.num_computed == 1 and end % block_size > 1 and sequence.generated:
                sequence.num_computed = end
                batch.take_decode(sequence)
                place += 1
            elif self._compute(sequence, batch):
                place += 1
            else:
                self._preempt_last(batch)

    def _preempt_last(self, batch: Batch) -> None:
        # The victim has had nothing in this pass yet: sequences are served in order, and it is the last of them.
        victim = self.running.pop()
        self.pool.release(victim.blocks)
        victim.begin([])
        self.waiting.appendleft(victim)
        self._counters.preemptions += 1
        batch.has_preempted = True

    def _admit_waiting(self, batch: Batch) -> None:
        while self.waiting and batch.budget > 0 and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            reusable = min(sequence.num_prompt_blocks, (sequence.num_tokens - 1) // self.limits.block_size)
            matched = self.pool.match(sequence.hashes, reusable)
            missing = self._blocks_for(sequence.num_tokens) - len(matched)
            if missing > self.pool.num_free_beside(matched):
                return
            self.pool.hold(matched)
            sequence.begin(matched)
            self._count_prompt(sequence)
            self.running.append(self.waiting.popleft())
            has_room = self._compute(sequence, batch)
            assert has_room, "the blocks of the whole prompt were free"

    def _count_prompt(self, sequence: Sequence) -> None:
        # Once a request: a preempted one comes back with num_cached set.
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self._counters.prompt_tokens += sequence.num_prompt_tokens
            self._counters.cached_tokens += sequence.num_cached

    def _compute(self, sequence: Sequence, batch: Batch) -> bool:
        """Give a running sequence its share of the pass; False, and nothing changed, if blocks are lacking."""
        begin, total = sequence.num_computed, sequence.num_tokens
        end = min(total, begin + batch.budget)
        drafted, accepted = 0, 0
        if self._speculation is not None and end == total == begin + 1 > sequence.num_prompt_tokens:
            most = min(batch.budget, sequence.num_remaining) - 1
            drafted, accepted = self._speculation.draft(sequence.draw, most)
        lacking = -(-(end + accepted) // self.limits.block_size) - len(sequence.blocks)
        if lacking > 0:
            if lacking > self.pool.num_free:
                return False
            sequence.blocks += self.pool.allocate(lacking)
        sequence.num_computed = end
        if end >= sequence.next_full:
            sequence.fill(self.pool)
        sequence.num_accepted = accepted
        if drafted:
            self._counters.drafted_tokens += drafted
            sequence.num_drafted_total += drafted
        batch.take(sequence, begin, drafted)
        return True

    def _finish_pass(self, batch: Batch) -> list[Output]:
        counters, outputs, ended = self._counters, [], []
        for sequence in batch.ready:
            output = sequence.generate()
            outputs.append(output)
            count = len(output.token_ids)
            counters.generated_tokens += count
            if sequence.num_accepted:
                # The drafts that were kept have their KV already, as the pass that checks them computes it.
                counters.accepted_tokens += count - 1
                sequence.num_kept_total += count - 1
                sequence.num_computed += count - 1
                sequence.num_accepted = 0
                if sequence.num_computed >= sequence.next_full:
                    sequence.fill(self.pool)
            if output.finish_reason is not None:
                ended.append(sequence)
                if self._speculation is not None:
                    told = sequence.num_drafted_total, sequence.num_kept_total
                    outputs[-1] = replace(output, speculation=told)
        self._remove_ended(ended)
        return outputs

    def _remove_ended(self, ended: list[Sequence]) -> None:
        for sequence in ended:
            self.pool.release(sequence.blocks)
            del self._sequences[sequence.request.id]
        if ended:
            self.running = [sequence for sequence in self.running if sequence.request.id in self._sequences]

    def _end_early(self, output: Output) -> None:
        sequence = self._sequences.pop(output.request_id, None)
        if sequence is None:
            return
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        self._ended_early.append(output)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)
