"""One worker's load as the router knows it: exact where bookings tell, estimated for the pass under way.

A worker computes prompts in passes of at most `max_num_tokens` tokens, first in, first out, beside one token for each
sequence that decodes. The server hears of a pass when it ends. Since it knows all that it sent there, it knows what the
next pass works on, and the learnt pass times say when that one ends; every report corrects the estimate.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from trtserve.plugins.api import PassStats, Request, WorkerLoad
from trtserve.plugins.routing_api import LONG_AGO_S, PassTimes, WorkerView
from trtserve.server.router.speeds import PassTimeModel

_START_S = 0.0002
"""An idle worker begins its pass about so long after the first request was sent; what is sent until then joins it."""


@dataclass(slots=True, eq=False)
class Booked:
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
    prompt that the pass completed, `pass_ended`, and then, as the requests end, `ended`."""

    def __init__(self, view: WorkerView, pass_times: PassTimeModel) -> None:
        self.view = view
        self.pass_times = pass_times
        self._kv_tokens = view.kv_tokens
        self._prompts: deque[Booked] = deque()  # sent, first token not seen
        self._progress = 0.0  # tokens that a sequence decoding since the beginning would have got
        self._starts_s: float | None = None  # idle until now, and something was sent: the next pass begins then
        self._done_in_pass = 0  # prompt tokens of the prompts that this pass completed
        self._covered = 0  # prompt tokens that the pass under way computes, as estimated
        self._began_s = LONG_AGO_S
        self._set_decode_times()

    # -------------------------------------------------------------- bookings

    def send(self, booked: Booked) -> None:
        view, request = self.view, booked.request
        view.booked_requests += 1
        view.booked_tokens += len(request.prompt) + request.sampling.max_tokens
        view.context_tokens += len(request.prompt)
        view.free_blocks -= self._new_blocks(booked)
        self._prompts.append(booked)
        if self._starts_s is None and not self._is_running(booked.sent_s):
            self._starts_s = view.pass_ends_s = booked.sent_s
        self._set_decode_times()
        self._count_queue()

    def prompt_done(self, booked: Booked, cached_tokens: int) -> None:
        """Its first token came."""
        if booked.is_prompt_done:
            return
        booked.is_prompt_done = True
        booked.progress_at_first = self._progress
        self._prompts.remove(booked)
        self._done_in_pass += len(booked.request.prompt) - cached_tokens - booked.computed_tokens
        self.view.decoding += 1
        self._count_queue()

    def ended(self, booked: Booked) -> None:
        """The booking is given back, whatever became of the request."""
        view, request = self.view, booked.request
        view.booked_requests -= 1
        view.booked_tokens -= len(request.prompt) + request.sampling.max_tokens
        view.context_tokens = max(0, view.context_tokens - len(request.prompt) - self.generated_tokens(booked))
        if booked.is_prompt_done:
            view.decoding -= 1
        else:
            self._prompts.remove(booked)
        if not view.booked_requests:
            view.context_tokens = 0
            self._covered = 0
            self._starts_s = None
        self._set_decode_times()
        self._count_queue()

    def generated_tokens(self, booked: Booked) -> int:
        """Tokens that a request has got so far; exact unless it was preempted or drafts more luckily than others."""
        return round(self._progress - booked.progress_at_first) if booked.is_prompt_done else 0

    # -------------------------------------------------------------- passes

    def pass_ended(self, stats: PassStats | None, load: WorkerLoad, tokens: int, rows: int, now_s: float) -> None:
        """A step's report: `rows` sequences got `tokens` tokens."""
        view = self.view
        view.load = load
        # The report is older than the pass that begins now, which admits what was sent meanwhile.
        taken = sum(self._new_blocks(booked) for booked in self._prompts if not booked.computed_tokens)
        view.free_blocks = load.free_blocks - taken
        if rows:
            self._progress += tokens / rows
            view.context_tokens += tokens
        if stats is None:
            self._done_in_pass = 0
            if rows:  # an engine that tells nothing of its passes: another one begins, is all that is known
                self._starts_s = None
                self._begin_pass(now_s, False)
            return
        self._advance(stats)
        if stats.decode_sequences and not stats.prefill_tokens:
            # What was counted token by token drifts where requests end early or are preempted.
            waiting = sum(len(booked.request.prompt) for booked in self._prompts)
            view.context_tokens = stats.context_tokens + stats.decode_sequences + waiting
        is_blocked = not stats.prefill_tokens and bool(self._prompts) and self._prompts[0].sent_s < self._began_s
        self._starts_s = None
        self._begin_pass(now_s, is_blocked)

    def observe(self, now_s: float) -> None:
        """Before a decision: a pass that an idle worker was about to begin has begun by now."""
        if self._starts_s is not None and now_s > self._starts_s + _START_S:
            began_s, self._starts_s = self._starts_s, None
            self._begin_pass(began_s, False)

    def use(self, times: PassTimes) -> None:
        """Estimate with these from now on; the newest are the same for all workers of a role."""
        if self.view.pass_times is not times:
            self.view.pass_times = times
            self._set_decode_times()

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
        view = self.view
        return view.decoding > 0 or self._covered > 0 or view.pass_ends_s > now_s

    def _new_blocks(self, booked: Booked) -> int:
        """KV blocks that its prompt takes beside those that were there."""
        return -(-len(booked.request.prompt) // self.view.info.block_size) - booked.overlap_blocks

    def _advance(self, stats: PassStats) -> None:
        """What the pass computed and completed no prompt went to the prompts in order."""
        rest, self._done_in_pass = stats.prefill_tokens - self._done_in_pass, 0
        for booked in self._prompts:
            if rest <= 0:
                break
            share = min(rest, booked.remaining_tokens)
            booked.computed_tokens += share
            rest -= share

    def _begin_pass(self, now_s: float, is_blocked: bool) -> None:
        """Estimate the pass that begins now."""
        view = self.view
        view.pass_times = self.pass_times.times
        self._set_decode_times()
        room = max(0, view.info.max_num_tokens - view.decoding)
        queued = sum(booked.remaining_tokens for booked in self._prompts)
        self._covered = 0 if is_blocked else min(room, queued)
        self._began_s = now_s
        view.is_prefilling = self._covered > 0
        if not view.is_prefilling and not view.decoding:
            view.pass_ends_s = LONG_AGO_S
        else:
            pass_ms = view.pass_times.prefill_ms(self._covered) + (view.decode_ms if view.decoding else 0.0)
            view.pass_ends_s = now_s + pass_ms / 1000
        self._count_queue()

    def _set_decode_times(self) -> None:
        view = self.view
        curve, usage = view.pass_times.decode, view.context_tokens / self._kv_tokens
        inside = curve.low if usage < curve.low else curve.high if usage > curve.high else usage
        view.decode_slope_ms = slope = curve.linear + 2 * curve.quadratic * inside
        view.decode_ms = curve.constant + (slope - curve.quadratic * inside) * inside

    def _count_queue(self) -> None:
        """Prompt tokens that the pass under way leaves, and the prompts in the last pass they will need."""
        view = self.view
        left = sum(booked.remaining_tokens for booked in self._prompts) - self._covered
        view.queued_tokens = max(0, left)
        last, count = view.queued_tokens % view.info.max_num_tokens, 0
        for booked in reversed(self._prompts):
            if last <= 0:
                break
            count += 1
            last -= booked.remaining_tokens
        view.queued_prompts = count
