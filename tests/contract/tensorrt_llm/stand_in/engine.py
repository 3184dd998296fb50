"""The engine's thread: one step at a time over all requests, as the executor's loop in rank 0 would make them.

A step ends requests that were aborted, admits what fits, prefills up to max_num_tokens, lets every running sequence say
its next tokens, and posts all responses at once. An unexpected error, or the fatal token, ends the executor for good.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from tensorrt_llm.executor.iteration_result import IterationResult
from tensorrt_llm.executor.result import Response
from tensorrt_llm.executor.utils import RequestError

from .admission import refusal
from .delivery import call_on, post_responses
from .disaggregation import Disaggregation
from .engine_settings import EngineSettings
from .environment import Environment
from .iterations import iteration_stats
from .request import Request
from .sequence import Sequence
from .tokens import mixed
from .violations import violated


class Engine:
    """`submit` and `abort` may be called on any thread; results get their responses on the loop they were made in."""

    def __init__(self, settings: EngineSettings, environment: Environment, died: Callable[[], None]) -> None:
        self.settings = settings
        self.environment = environment
        self.pools = settings.make_pools(environment)
        self.disaggregation = Disaggregation(settings, environment) if settings.transceiver else None
        self.stats: IterationResult | None = None
        self.events: IterationResult | None = None
        self.error: Exception | None = None
        self._died = died
        self._queued: deque[Request] = deque()
        self._active: list[Request] = []
        self._aborts: set[int] = set()
        self._held_blocks: dict[int, tuple[int, int]] = {}  # of prefilled prompts: rank and blocks
        self._iteration = 0
        self._is_closed = False
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stand-in-engine")
        self._thread.start()

    def submit(self, request: Request) -> None:
        with self._work:
            self._queued.append(request)
            self._work.notify()

    def abort(self, request_id: int) -> None:
        """Fatal for a request whose KV is on its way; harmless for one that has ended or never was."""
        if self.disaggregation is not None and self.disaggregation.is_in_flight(request_id):
            error = violated(f"request {request_id} is aborted while its KV transfer is in flight")
            self._die(error)
            raise error
        with self._work:
            self._aborts.add(request_id)
            self._work.notify()

    def close(self) -> None:
        with self._work:
            self._is_closed = True
            self._work.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self.disaggregation is not None:
            self.disaggregation.close()

    def _run(self) -> None:
        while not self._is_closed:
            with self._work:
                self._work.wait_for(self._has_work, timeout=0.05)
            started = time.monotonic()
            try:
                busy = self._step()
            except Exception as error:
                self._die(error)
                return
            if busy:
                time.sleep(max(0.0, self.environment.step_s - (time.monotonic() - started)))

    def _has_work(self) -> bool:
        return bool(self._queued or self._active or self._aborts or self._is_closed)

    def _step(self) -> bool:
        started = time.monotonic()
        posts: list[tuple[Request, Response]] = []
        posts += self._cancel_aborted()
        self._free_given_up()
        posts += self._admit()
        budget = self.settings.max_num_tokens
        running = [request for request in self._active if request.is_pulled]
        num_contexts = sum(bool(request.prefill_left) for request in running)
        for request in running:
            budget = self._advance(request, budget)
            posts += [(request, response) for response in request.reports(self.settings.stream_interval)]
        self._complete([request for request in running if request.has_ended], posts)
        if running:
            self._iteration += 1
        post_responses(posts)
        contexts = num_contexts, self.settings.max_num_tokens - budget
        self._post_iteration(self._iteration_stats(started, contexts, len(running)) if running else [])
        return bool(self._active or self._queued)

    def _cancel_aborted(self) -> list[tuple[Request, Response]]:
        with self._work:
            aborts, self._aborts = self._aborts, set()
            queued = [request for request in self._queued if request.id in aborts]
            self._queued = deque(request for request in self._queued if request.id not in aborts)
        active = [request for request in self._active if request.id in aborts]
        posts = [(request, response) for request in [*queued, *active] for response in request.cancel()]
        for request in active:
            self._active.remove(request)
            self.pools[request.rank].release(request.blocks)
        return posts

    def _free_given_up(self) -> None:
        for request_id in self.disaggregation.take_freed() if self.disaggregation else ():
            rank, blocks = self._held_blocks.pop(request_id)
            self.pools[rank].release(blocks)

    def _admit(self) -> list[tuple[Request, Response]]:
        """In the order of arrival; the first that does not fit holds up the others."""
        posts = []
        while self._queued and len(self._active) < self.settings.max_batch_size:
            request = self._queued[0]
            pool, wanted = self.pools[request.rank], request.wanted_blocks(self.pools[request.rank])
            refused = refusal(request, wanted, pool, self.settings, self.environment)
            if refused is None and not pool.has_room(wanted):
                break
            with self._work:
                self._queued.popleft()
            if refused is not None:
                posts.append((request, Response(error=RequestError(refused), is_final=True)))
                continue
            request.blocks = wanted
            self._begin(request)
        return posts

    def _begin(self, request: Request) -> None:
        pool = self.pools[request.rank]
        request.cached_tokens = pool.cached_tokens(request.prompt, request.salt)
        pool.reserve(request.blocks)
        request.prefill_left = 0 if request.is_generation_only else len(request.prompt) - request.cached_tokens
        self._active.append(request)
        if request.is_generation_only:
            assert self.disaggregation is not None
            request.is_pulled = False
            self.disaggregation.start_pull(request, self._pulled)

    def _pulled(self, request: Request, error: str | None) -> None:
        """On the puller's thread."""
        with self._work:
            if error is None:
                request.is_pulled = True
                return
            if request in self._active:
                self._active.remove(request)
                self.pools[request.rank].release(request.blocks)
        post_responses([(request, Response(error=RequestError(error), is_final=True))])

    def _advance(self, request: Request, budget: int) -> int:
        """One step of one request; what it leaves of the step's prefill tokens."""
        if request.prefill_left:
            taken = min(budget, request.prefill_left)
            request.prefill_left -= taken
            budget -= taken
            if request.prefill_left:
                return budget
        if request.first_token is None:
            self._first_step(request)
            return budget
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.step(self._tokens_in_step(sequence.stream.state))
        return budget

    def _first_step(self, request: Request) -> None:
        request.first_token = time.monotonic()
        pool = self.pools[request.rank]
        pool.store(request.prompt, request.salt, partial=False)
        given = len(request.params.first_gen_tokens or []) if request.is_generation_only and request.params else 1
        for sequence in request.sequences:
            sequence.step(given)
        if request.is_generation_only and request.params:
            said = request.sequences[0].tokens
            if said != request.params.first_gen_tokens:
                raise violated(f"first_gen_tokens {request.params.first_gen_tokens} are not what prefill said: {said}")
            self._show_first_tokens(request.sequences[0])

    def _show_first_tokens(self, sequence: Sequence) -> None:
        if self.environment.exclude_first_tokens == "1":
            sequence.leave_out()
        elif self.environment.exclude_first_tokens == "hidden":
            sequence.hidden = len(sequence.tokens)
            sequence.step(1)

    def _tokens_in_step(self, state: int) -> int:
        drafts = self.settings.draft_tokens
        return 1 + mixed(state) % (drafts + 1) if drafts else 1

    def _complete(self, ended: list[Request], posts: list[tuple[Request, Response]]) -> None:
        for request in ended:
            self._active.remove(request)
            pool = self.pools[request.rank]
            if request.is_context_only and request.sequences[0].finish_reason == "length":
                assert self.disaggregation is not None
                response = next(response for owner, response in posts if owner is request)
                self._held_blocks[request.id] = (request.rank, request.blocks)
                self.disaggregation.hand_over(request, response)
            else:
                pool.release(request.blocks)
            for sequence in request.sequences:
                pool.store(request.prompt + sequence.tokens, request.salt, partial=True)

    def _iteration_stats(self, started: float, contexts: tuple[int, int], running: int) -> list[dict[str, Any]]:
        """contexts: requests in their context phase, and the tokens computed for them."""
        if not self.settings.enable_iter_perf_stats:
            return []
        latency_ms = (time.monotonic() - started + self.environment.step_s) * 1000
        queued = len(self._queued)
        return [iteration_stats(self._iteration, latency_ms, running, queued, contexts, self.settings, self.pools)]

    def _post_iteration(self, stats: list[dict[str, Any]]) -> None:
        """Statistics and events leave with the step that made them, once a first request has made the queues."""
        if self.stats is not None and stats:
            call_on(self.stats._loop, partial(self.stats.put_all, stats))
        events = [event for buffer in self.settings.event_buffers for event in buffer.take()] if self.events else []
        if self.events is not None and events:
            call_on(self.events._loop, partial(self.events.put_all, events))

    def _die(self, error: Exception) -> None:
        """All that lives is told, and nothing is accepted any more."""
        self.error, self._is_closed = error, True
        with self._work:
            lost, self._active, self._queued = [*self._active, *self._queued], [], deque()
        fatal = RuntimeError(f"Executor has been shut down: {error}")
        post_responses([(request, Response(error=fatal, is_final=True)) for request in lost])
        self._died()
