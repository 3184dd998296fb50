"""What it costs to send a request to a worker: milliseconds of waiting that it causes, its own and that of others.

For a prompt of L tokens of which c blocks are there already, so n tokens are to be computed; a worker whose plan has
p tokens of k prompts in its last pass, beginning at `begin`; P(n) the time of a prefill pass, d that of a decode pass
there now (0 if nothing decodes); T(n) the time of all the passes that n tokens take, P and d each:

    join     = T(p + n) + others * k * (growth of the last pass) + decode * decoding * (T(p + n) - T(p))
    apart    = T(p) + T(n) + decode * decoding * T(n)            that pass runs alone, this prompt comes in the next one
    slow     = slow * G * (D'(u) * (L + G/2) / KV tokens * active / 2 + D(u) - D(0))
    memory   = G * d * max(0, u + L / KV tokens - 1)             no room for its KV: others must finish first
    evict    = (blocks needed beyond the unused ones) * P per block * chance that what is evicted would be used again
    reuse    = c * P per block * chance that a stored block is used again
    cost     = begin - now + min(join, apart) + slow + memory + evict - reuse

G: expected output tokens; u: share of the worker's KV that its requests use. The weights `others`, `decode` and `slow`
lie between 0 (only this request counts) and 1 (all count alike). Everything is clamped to where it was fitted.
"""

from __future__ import annotations

from trtserve.plugins.policies.kv.options import KVOptions
from trtserve.plugins.routing_api import Estimates, PassTimes, WorkerView


class PassCosts:
    """T(n) for one kind of worker, remembered for the length of a decision: most workers are asked for the same n."""

    __slots__ = ("_known", "budget", "full_ms", "prefill_ms")

    def __init__(self, times: PassTimes, budget: int) -> None:
        self.budget = budget
        self.prefill_ms = times.prefill_ms
        self.full_ms = times.prefill_ms(budget)
        self._known: dict[int, tuple[float, int]] = {}

    def of(self, tokens: int) -> tuple[float, int]:
        """(time without decoding, number of passes) for so many prompt tokens."""
        known = self._known.get(tokens)
        if known is None:
            full, rest = divmod(tokens, self.budget)
            known = self._known[tokens] = full * self.full_ms + self.prefill_ms(rest), full + (rest > 0)
        return known


class PlannedWorker:
    """A worker in one decision: its view, and what this decision has added to its plan already.

    begin_ms: from now until the last pass of its plan begins. is_open: that is the very next pass to begin, and it
    does so within the lead.
    """

    __slots__ = (
        "begin_ms",
        "block_size",
        "decode_ms",
        "decoding",
        "eviction_ms",
        "free_slots",
        "is_open",
        "kv_tokens",
        "memory_ms",
        "mine_ms",
        "passes",
        "prompts",
        "reuse_ms",
        "theirs_ms",
        "tokens",
        "unused_blocks",
        "usage",
        "view",
        "wait_ms",
    )

    def __init__(
        self, view: WorkerView, passes: PassCosts, now_s: float, estimates: Estimates, options: KVOptions
    ) -> None:
        info, curve = view.info, view.pass_times.decode
        self.view = view
        self.passes = passes
        self.block_size = info.block_size
        self.kv_tokens = kv_tokens = info.num_blocks * info.block_size
        self.free_slots = info.max_num_seqs - view.booked_requests
        self.unused_blocks = view.unused_blocks
        self.usage = view.context_tokens / kv_tokens
        usage = min(self.usage, curve.high)
        self.decoding = options.decode_weight * view.decoding
        self.decode_ms = curve.at(usage) if view.decoding else 0.0
        self.memory_ms = estimates.output_tokens * (self.decode_ms or curve.at(curve.low))
        slow = options.slow_weight * estimates.output_tokens
        self.mine_ms = slow * (curve.linear + curve.quadratic * usage) * usage
        slope = curve.linear + 2 * curve.quadratic * usage
        self.theirs_ms = slow * slope * view.booked_requests / (2 * kv_tokens)  # for each token of KV
        block_ms = passes.full_ms * info.block_size / passes.budget * estimates.reuse_probability
        self.reuse_ms = options.reuse_weight * block_ms
        self.eviction_ms = options.evict_weight * block_ms * view.eviction_loss
        full, self.tokens = divmod(view.queued_tokens, passes.budget)
        self.prompts = view.queued_prompts
        self.wait_ms = self.begin_ms = max(0.0, (view.pass_ends_s - now_s) * 1000)
        self.is_open = not full and not (view.is_prefilling and self.wait_ms > options.lead_ms)
        if full:
            self.begin_ms += full * (passes.full_ms + self.decode_ms)

    def add(self, new: int, joins: bool) -> None:
        """Put a prompt into the plan: into its last pass, or into one of its own after it."""
        passes = self.passes
        if not joins:
            self.begin_ms += passes.prefill_ms(self.tokens) + self.decode_ms
            self.tokens = self.prompts = 0
            self.is_open = False
        full, self.tokens = divmod(self.tokens + new, passes.budget)
        self.prompts = 1 if full else self.prompts + 1
        if full:
            self.begin_ms += full * (passes.full_ms + self.decode_ms)
            self.is_open = False


def cost_ms(
    worker: PlannedWorker, length: int, new: int, output_tokens: float, others: float, may_wait: bool
) -> tuple[float, bool]:
    """The cost of a prompt of `length` tokens, `new` of them to compute, and whether it joins the plan's last pass.

    `others`: the weight of the other prompts of that pass. may_wait: it may also come after that pass.
    """
    decode_ms, decoding = worker.decode_ms, worker.decoding
    tokens = worker.tokens
    alone_ms, count = worker.passes.of(new)
    alone_ms += count * decode_ms
    joins = True
    if not tokens:
        total = alone_ms * (1 + decoding)
    else:
        passes = worker.passes
        together_ms, count = passes.of(tokens + new)
        together_ms += count * decode_ms
        before_ms = passes.prefill_ms(tokens) + decode_ms
        grown_ms = passes.prefill_ms(min(passes.budget, tokens + new)) + decode_ms - before_ms
        total = together_ms + others * grown_ms * worker.prompts + decoding * (together_ms - before_ms)
        if may_wait:
            apart_ms = before_ms + alone_ms * (1 + decoding)
            if apart_ms < total:
                total, joins = apart_ms, False
    reused = (length - new) // worker.block_size
    share = worker.usage + length / worker.kv_tokens - 1.0
    if share > 0:
        total += share * worker.memory_ms
    evicted = -(-length // worker.block_size) - reused - worker.unused_blocks
    if evicted > 0:
        total += evicted * worker.eviction_ms
    total += worker.begin_ms + worker.mine_ms + worker.theirs_ms * (length + output_tokens / 2)
    return total - reused * worker.reuse_ms, joins
