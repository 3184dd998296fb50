"""One worker's load as the router knows it: exact where bookings tell, estimated for the pass under way.

A worker computes prompts in passes of at most `max_num_tokens` tokens, first in, first out, beside one token for each
sequence that decodes. The server hears of a pass when it ends. Since it knows all that it sent there, it knows what the
next pass works on, and the learnt pass times say when that one ends; every report corrects the estimate.
"""

from __future__ import annotations

from collections import deque

import msgspec

from trtserve.plugins.api import PassStats, Request, WorkerLoad
from trtserve.plugins.routing_api import LONG_AGO_S, PassTimes, WorkerView
from trtserve.server.router.speeds import PassTimeModel

_START_S = 0.0002
"""An idle worker begins its pass about so long after the first request was sent; what is sent until then joins it."""


class Booked(msgspec.Struct, eq=False):
    """A request that was sent to a worker and has not ended."""

    request: Request
    overlap_blocks: int  # leading blocks that were there, or promised, when it was sent
    sent_s: float
    uncached_tokens: int  # of its prompt, as predicted
    computed_tokens: int = 0  # of those, in passes that have ended
    is_prompt_done: bool = False
    progress_at_first: float = 0.0  # the worker's progress before the pass that gave its first token

    @property
    def remaining_tokens(self) -> int:
        return max(1, self.uncached_tokens - self.computed_tokens)


class TrackedLoad:
    """Keeps a worker's `WorkerView` true. The calls of one engine step come in this order: `prompt_done` for each
    prompt that the pass completed, `pass_ended`, and then, as the requests end, `ended`.

    Passes end much more often than decisions are made, so only what is counted is counted at once; the pass under way
    and the queue behind it are estimated when `view` is asked for, or when what they follow from is about to change.
    """

    def __init__(self, view: WorkerView, pass_times: PassTimeModel) -> None:
        self.counts = view
        """The same object as `view`, with what is counted exactly: bookings, slots, tokens, blocks. Cheap."""
        self.pass_times = pass_times
        self._kv_tokens = view.kv_tokens
        # Sent, first token not seen; what follows says it of all of them together.
        self._prompts: deque[Booked] = deque()
        self._prompt_tokens = 0
        self._remaining_tokens = 0
        self._untouched_blocks = 0  # KV blocks that those take of which nothing is computed yet
        self._progress = 0.0  # tokens that a sequence decoding since the beginning would have got
        self._starts_s: float | None = None  # idle until now, and something was sent: the next pass begins then
        self._done_in_pass = 0  # prompt tokens of the prompts that this pass completed
        self._covered = 0  # prompt tokens that the pass under way computes, as estimated
        self._began_s = LONG_AGO_S
        # (when, is it blocked, pass times known then) of a pass that nobody has asked about yet
        self._begun: tuple[float, bool, PassTimes] | None = None
        self._is_stale = False  # the view's estimates, of the queue and of decoding
        self._set_decode_times()

    @property
    def view(self) -> WorkerView:
        """All that is known and estimated, as of the last call."""
        self._settle()
        if self._is_stale:
            self._is_stale = False
            self._set_decode_times()
            self._count_queue()
        return self.counts

    # -------------------------------------------------------------- bookings

    def send(self, booked: Booked) -> None:
        self._settle()
        view, request = self.counts, booked.request
        view.booked_requests += 1
        view.booked_tokens += len(request.prompt) + request.sampling.max_tokens
        view.context_tokens += len(request.prompt)
        view.free_blocks -= self._new_blocks(booked)
        self._prompts.append(booked)
        self._count_prompt(booked, 1)
        if self._starts_s is None and not self._is_running(booked.sent_s):
            self._starts_s = view.pass_ends_s = booked.sent_s
        self._is_stale = True

    def prompt_done(self, booked: Booked, cached_tokens: int) -> None:
        """Its first token came."""
        if booked.is_prompt_done:
            return
        self._settle()
        booked.is_prompt_done = True
        booked.progress_at_first = self._progress
        self._prompts.remove(booked)
        self._count_prompt(booked, -1)
        self._done_in_pass += len(booked.request.prompt) - cached_tokens - booked.computed_tokens
        self.counts.decoding += 1
        self._is_stale = True

    def ended(self, booked: Booked) -> None:
        """The booking is given back, whatever became of the request."""
        self._settle()
        view, request = self.counts, booked.request
        view.booked_requests -= 1
        view.booked_tokens -= len(request.prompt) + request.sampling.max_tokens
        view.context_tokens = max(0, view.context_tokens - len(request.prompt) - self.generated_tokens(booked))
        if booked.is_prompt_done:
            view.decoding -= 1
        else:
            self._prompts.remove(booked)
            self._count_prompt(booked, -1)
        if not view.booked_requests:
            view.context_tokens = 0
            self._covered = 0
            self._starts_s = None
        self._is_stale = True

    def generated_tokens(self, booked: Booked) -> int:
        """Tokens that a request has got so far; exact unless it was preempted or drafts more luckily than others."""
        return round(self._progress - booked.progress_at_first) if booked.is_prompt_done else 0

    # -------------------------------------------------------------- passes

    def pass_ended(self, stats: PassStats | None, load: WorkerLoad, tokens: int, rows: int, now_s: float) -> None:
        """A step's report: `rows` sequences got `tokens` tokens. Hot."""
        view = self.counts
        view.load = load
        # The report is older than the pass that begins now, which admits what was sent meanwhile.
        view.free_blocks = load.free_blocks - self._untouched_blocks
        if rows:
            self._progress += tokens / rows
            view.context_tokens += tokens
        if stats is None:
            self._done_in_pass = 0
            if rows:  # an engine that tells nothing of its passes: another one begins, is all that is known
                self._begin_later(now_s, False)
            return
        if self._prompts:
            self._advance(stats)
        self._done_in_pass = 0
        if stats.decode_sequences and not stats.prefill_tokens:
            # What was counted token by token drifts where requests end early or are preempted.
            view.context_tokens = stats.context_tokens + stats.decode_sequences + self._prompt_tokens
        is_blocked = not stats.prefill_tokens and bool(self._prompts) and self._prompts[0].sent_s < self._began_s
        self._begin_later(now_s, is_blocked)

    def observe(self, now_s: float) -> None:
        """Before a decision: a pass that an idle worker was about to begin has begun by now."""
        if self._starts_s is not None and now_s > self._starts_s + _START_S:
            self._begin_later(self._starts_s, False)

    def use(self, times: PassTimes) -> None:
        """Estimate with these from now on; the newest are the same for all workers of a role."""
        self._settle()
        if self.counts.pass_times is not times:
            self.counts.pass_times = times
            self._is_stale = True

    def expected_ms(self, new_tokens: int, now_s: float) -> tuple[float, float]:
        """(until a prompt sent now could begin, its passes) for so many tokens to compute; call `observe` before."""
        view = self.view
        budget = view.info.max_num_tokens
        full_ms = view.pass_times.prefill_ms(budget)
        decode_ms = view.decode_ms if view.decoding else 0.0

        def passes_ms(tokens: int) -> float:
            full, rest = divmod(tokens, budget)
            total = full * (full_ms + decode_ms)
            return total + view.pass_times.prefill_ms(rest) + decode_ms if rest else total

        wait_ms = max(0.0, (view.pass_ends_s - now_s) * 1000)
        return wait_ms + passes_ms(view.queued_tokens), passes_ms(new_tokens)

    def _is_running(self, now_s: float) -> bool:
        """Whether a pass is under way, as far as is known; one that is late counts."""
        view = self.counts
        return view.decoding > 0 or self._covered > 0 or view.pass_ends_s > now_s

    def _new_blocks(self, booked: Booked) -> int:
        """KV blocks that its prompt takes beside those that were there."""
        return -(-len(booked.request.prompt) // self.counts.info.block_size) - booked.overlap_blocks

    def _count_prompt(self, booked: Booked, sign: int) -> None:
        """It comes to the prompts, or leaves them."""
        self._prompt_tokens += sign * len(booked.request.prompt)
        self._remaining_tokens += sign * booked.remaining_tokens
        if not booked.computed_tokens:
            self._untouched_blocks += sign * self._new_blocks(booked)

    def _advance(self, stats: PassStats) -> None:
        """What the pass computed and completed no prompt went to the prompts in order."""
        rest = stats.prefill_tokens - self._done_in_pass
        for booked in self._prompts:
            if rest <= 0:
                break
            share = min(rest, booked.remaining_tokens)
            self._count_prompt(booked, -1)
            booked.computed_tokens += share
            self._count_prompt(booked, 1)
            rest -= share

    def _begin_later(self, began_s: float, is_blocked: bool) -> None:
        """A pass begins now, to be estimated when somebody asks."""
        self._starts_s = None
        self._began_s = began_s
        self._begun = began_s, is_blocked, self.pass_times.times
        self._is_stale = True

    def _settle(self) -> None:
        """Estimate the pass that has begun, from what is still as it was then."""
        if self._begun is None:
            return
        (began_s, is_blocked, times), self._begun = self._begun, None
        view = self.counts
        view.pass_times = times
        room = max(0, view.info.max_num_tokens - view.decoding)
        self._covered = 0 if is_blocked else min(room, self._remaining_tokens)
        view.is_prefilling = self._covered > 0
        if not view.is_prefilling and not view.decoding:
            view.pass_ends_s = LONG_AGO_S
        else:
            self._set_decode_times()
            pass_ms = view.pass_times.prefill_ms(self._covered) + (view.decode_ms if view.decoding else 0.0)
            view.pass_ends_s = began_s + pass_ms / 1000
        self._is_stale = True

    def _set_decode_times(self) -> None:
        view = self.counts
        curve, usage = view.pass_times.decode, view.context_tokens / self._kv_tokens
        inside = curve.low if usage < curve.low else curve.high if usage > curve.high else usage
        view.decode_slope_ms = slope = curve.linear + 2 * curve.quadratic * inside
        view.decode_ms = curve.constant + (slope - curve.quadratic * inside) * inside

    def _count_queue(self) -> None:
        """Prompt tokens that the pass under way leaves, and the prompts in the last pass they will need."""
        view = self.counts
        view.queued_tokens = max(0, self._remaining_tokens - self._covered)
        last, count = view.queued_tokens % view.info.max_num_tokens, 0
        for booked in reversed(self._prompts):
            if last <= 0:
                break
            count += 1
            last -= booked.remaining_tokens
        view.queued_prompts = count
