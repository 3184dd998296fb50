"""What it costs to send a request to a worker: milliseconds of waiting that it causes, its own and that of others.

For a prompt of L tokens of which c blocks are there already, so n tokens are to be computed; a worker whose plan has
p tokens of k prompts in its last pass, beginning at `begin`; P(n) the time of a prefill pass, d that of a decode pass
there now (0 if nothing decodes); T(n) the time of all the passes that n tokens take, P and d each; w(m) the worth of
the wait of m decoding sequences:

    apart    = T(p) + T(n) + w(decoding + k) * T(n)                that pass runs alone, this prompt comes after it
    join     = T(p + n) + others * k * (growth of the last pass) + w(decoding) * (T(p + n) - T(p))
    later    = T(n) * (prompts planned behind it) + w(1) * (their passes, which stall its decoding)
    slow     = w(1) * G * (D'(u) * (L + G/2) / KV tokens * active / 2 + D(u) - D(0))
    memory   = G * d * (share of the worker's KV that is lacking)       others must finish first
    slot     = G * d / active for each sequence that must end before there is a slot
    evict    = (blocks needed beyond the unused ones) * worth of a block * chance that those were worth it
    reuse    = c * worth of a block
    cost     = begin - now + min(join, apart) + later + slow + memory + slot + evict - reuse

    w(m)     = decode * m / (1 + decode * m / limit)

G: expected output tokens; u: share of the worker's KV that its requests use; the worth of a block: the time to compute
it in a full pass, times the chance that it would be. What is evicted is old: its chance falls with its age against the
age at which blocks are used again. Everything is clamped to where it was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from trtserve.plugins.policies.kv.options import KVOptions
from trtserve.plugins.routing_api import Estimates, WorkerView


@dataclass(frozen=True, slots=True)
class Weights:
    """The options and the estimates, as every worker needs them in a decision."""

    decode: float
    decode_limit: float
    slow: float  # w(1) * G
    output_tokens: float  # G
    lead_ms: float

    @staticmethod
    def of(options: KVOptions, estimates: Estimates) -> Weights:
        return Weights(
            options.decode_weight,
            options.decode_limit,
            options.decode_weight * estimates.output_tokens,
            estimates.output_tokens,
            options.lead_ms,
        )


class PassCosts:
    """T(n) for one kind of worker, remembered for the length of a decision: most workers are asked for the same n."""

    __slots__ = (
        "_known",
        "block_ms",
        "block_size",
        "budget",
        "full_ms",
        "kv_tokens",
        "least_decode_ms",
        "max_num_seqs",
        "num_blocks",
        "prefill_ms",
    )

    def __init__(self, view: WorkerView, block_weight: float) -> None:
        """block_weight: the chance that a stored block will be wanted, as the options weigh it."""
        times, info = view.pass_times, view.info
        self.budget = info.max_num_tokens
        self.block_size = info.block_size
        self.num_blocks = info.num_blocks
        self.kv_tokens = info.num_blocks * info.block_size
        self.max_num_seqs = info.max_num_seqs
        self.prefill_ms = times.prefill_ms
        self.full_ms = times.prefill_ms(self.budget)
        self.least_decode_ms = times.decode.at(times.decode.low)
        self.block_ms = self.full_ms * info.block_size / self.budget * block_weight
        self._known: dict[int, tuple[float, int]] = {}

    def of(self, tokens: int) -> tuple[float, int]:
        """(time without decoding, number of passes) for so many prompt tokens."""
        known = self._known.get(tokens)
        if known is None:
            full, rest = divmod(tokens, self.budget)
            known = self._known[tokens] = full * self.full_ms + self.prefill_ms(rest), full + (rest > 0)
        return known

    def with_decodes_ms(self, tokens: int, decode_ms: float) -> float:
        prefill_ms, count = self.of(tokens)
        return prefill_ms + count * decode_ms

    def prompt(self, length: int, overlap_blocks: int, output_tokens: float, moves_kv: bool = False) -> PlannedPrompt:
        """A prompt of so many tokens, of which so many leading blocks are there; at least one token is computed.

        moves_kv: of one whose KV comes from another worker only what is left of its last block is computed.
        """
        computable = (length - 1) // self.block_size
        reused = min(overlap_blocks, computable)
        new = length - (computable if moves_kv else reused) * self.block_size
        prefill_ms, count = self.of(new)
        needed = -(-length // self.block_size) - reused
        return PlannedPrompt(length, new, prefill_ms, count, reused, needed, length + output_tokens / 2)


class PlannedWorker:
    """A worker in one decision: its view, and what this decision has added to its plan already.

    begin_ms: from now until the last pass of its plan begins. is_open: that is the very next pass to begin, it does so
    within the lead, and there is room for a sequence.
    """

    __slots__ = (
        "active",
        "begin_ms",
        "behind",
        "behind_ms",
        "block_ms",
        "decode_ms",
        "decoding",
        "evicted_ms",
        "free_blocks",
        "free_slots",
        "is_open",
        "kv_tokens",
        "lacking_ms",
        "limit",
        "passes",
        "prompts",
        "slope_ms",
        "slow_ms",
        "slowed_ms",
        "tokens",
        "unused_blocks",
        "view",
        "weight",
    )

    def __init__(self, view: WorkerView, passes: PassCosts, now_s: float, weights: Weights) -> None:
        self.view = view
        self.passes = passes
        self.kv_tokens = passes.kv_tokens
        self.active = active = view.booked_requests
        self.free_slots = free_slots = passes.max_num_seqs - active
        self.unused_blocks = view.unused_blocks
        self.free_blocks = view.free_blocks
        self.weight, self.limit = weights.decode, weights.decode_limit
        decode_ms = view.decode_ms
        self.decode_ms = decode_ms if active else 0.0
        self.slow_ms = slow_ms = weights.slow
        self.slope_ms = view.decode_slope_ms
        self.slowed_ms = slow_ms * (decode_ms - passes.least_decode_ms)
        self.lacking_ms = weights.output_tokens * decode_ms
        self.block_ms = passes.block_ms
        self.evicted_ms = passes.block_ms * view.eviction_loss
        tokens, self.prompts = view.queued_tokens, view.queued_prompts
        self.decoding = active - view.queued_prompts  # prompts in passes before the last one decode by then
        wait_ms = (view.pass_ends_s - now_s) * 1000
        if wait_ms < 0:
            wait_ms = 0.0
        self.is_open = free_slots > 0 and (wait_ms <= weights.lead_ms or not view.is_prefilling)
        if tokens >= passes.budget:
            full, tokens = divmod(tokens, passes.budget)
            wait_ms += full * (passes.full_ms + self.decode_ms)
            self.is_open = False
        self.tokens = tokens
        self.begin_ms = wait_ms
        self.behind = 0
        self.behind_ms = 0.0

    def worth(self, sequences: int) -> float:
        """w: what the wait of so many decoding sequences is worth."""
        weight = self.weight * sequences
        return weight / (1 + weight / self.limit)

    def cost_ms(self, prompt: PlannedPrompt, others: float) -> float:
        """The cost of a prompt here."""
        decode_ms, tokens = self.decode_ms, self.tokens
        alone_ms = prompt.prefill_ms + prompt.num_passes * decode_ms
        weight = self.weight * (self.decoding + self.prompts)
        own_ms = alone_ms + weight / (1 + weight / self.limit) * alone_ms
        if tokens:
            own_ms = min(own_ms + self.passes.prefill_ms(tokens) + decode_ms, self._join_ms(prompt.new, others))
        total = self.begin_ms + own_ms + self.slowed_ms
        total += self.slow_ms * self.slope_ms * prompt.context_tokens / self.kv_tokens * self.active / 2
        if self.behind:
            total += self.behind * alone_ms + self.weight * self.behind_ms
        needed = prompt.needed_blocks
        if needed > self.unused_blocks:
            total += (needed - self.unused_blocks) * self.evicted_ms
            if needed > self.free_blocks:
                total += (needed - self.free_blocks) / self.passes.num_blocks * self.lacking_ms
        if self.behind >= self.free_slots:
            # Somebody has to end first: of so many that run, one every so often.
            total += self.lacking_ms / max(1, self.active) * (self.behind - self.free_slots + 1)
        return total - prompt.reused_blocks * self.block_ms

    def _join_ms(self, new: int, others: float) -> float:
        passes, decode_ms, tokens = self.passes, self.decode_ms, self.tokens
        before_ms = passes.prefill_ms(tokens) + decode_ms
        together_ms = passes.with_decodes_ms(tokens + new, decode_ms)
        grown_ms = passes.prefill_ms(min(passes.budget, tokens + new)) + decode_ms - before_ms
        return together_ms + others * grown_ms * self.prompts + self.worth(self.decoding) * (together_ms - before_ms)

    def add(self, prompt: PlannedPrompt) -> None:
        """Count a prompt that this decision has planned here; the ones planned after it are served before it."""
        self._take(prompt)
        self.behind += 1
        self.behind_ms += prompt.prefill_ms + prompt.num_passes * self.decode_ms

    def send(self, prompt: PlannedPrompt) -> None:
        """Count a prompt that was sent here, behind all that was there before."""
        self._take(prompt)
        self.free_slots -= 1
        full, self.tokens = divmod(self.tokens + prompt.new, self.passes.budget)
        self.prompts = 1 if full else self.prompts + 1
        self.begin_ms += full * (self.passes.full_ms + self.decode_ms)

    def _take(self, prompt: PlannedPrompt) -> None:
        self.active += 1
        self.unused_blocks = max(0, self.unused_blocks - prompt.needed_blocks)
        self.free_blocks -= prompt.needed_blocks


class PlannedPrompt(msgspec.Struct, frozen=True, gc=False):
    """A prompt on workers of one kind that have equally much of it."""

    length: int
    new: int  # tokens to compute
    prefill_ms: float  # of its passes, without decoding
    num_passes: int
    reused_blocks: int
    needed_blocks: int
    context_tokens: float  # it will have in the mean while it decodes
