"""What a worker does between loading its engine and saying ready: a real token, then a probe of how fast it is.

The probe's steps go to the server like any others, so its model of pass times has something to start from: prefill
passes of three sizes, then decode passes with one sequence and with several.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from trtserve.plugins.api import Engine, EngineInfo, FinishReason, Request, RequestId, SamplingParams, StepOutputs

FIRST_REQUEST_ID = 1 << 62
"""The server's ids begin at 1 and never come here; engines whose libraries keep ids in int64 can take it."""

CACHE_SALT = "trtserve-warm-up"

_SHORTEST_PROMPT = 8
_DECODED_TOKENS = 6  # the first one comes from the prefill pass
_MOST_SEQUENCES = 8


class WarmUpFailed(Exception):
    """The engine cannot generate; the text says why."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Requests that run at the same time, with nothing else."""

    num_sequences: int
    prompt_tokens: int
    max_tokens: int


def first_token(info: EngineInfo) -> Probe:
    """The least that shows that an engine works."""
    prompt_tokens = min(_SHORTEST_PROMPT, _longest_prompt(info, 1))
    return Probe(1, prompt_tokens, min(2, _longest_sequence(info) - prompt_tokens))


def probes(info: EngineInfo) -> list[Probe]:
    """What teaches pass times, the shortest first; less of it where a sequence or the KV cache is small."""
    budget = info.max_num_tokens
    wanted = [max(_SHORTEST_PROMPT, budget // 16), max(_SHORTEST_PROMPT, budget // 4), budget]
    lengths = sorted({min(length, _longest_prompt(info, 1)) for length in wanted})
    return [Probe(1, length, 1) for length in lengths] + _decodes(info, lengths[0])


def _decodes(info: EngineInfo, prompt_tokens: int) -> list[Probe]:
    prompt_tokens = min(prompt_tokens, _longest_prompt(info, _DECODED_TOKENS))
    if prompt_tokens < 1:
        return []
    # An engine may keep a block in hand for each sequence; a probe that is preempted would teach nonsense.
    blocks_each = -(-(prompt_tokens + _DECODED_TOKENS) // info.block_size) + 1
    several = min(_MOST_SEQUENCES, info.max_num_seqs, info.num_blocks // blocks_each)
    return [Probe(size, prompt_tokens, _DECODED_TOKENS) for size in sorted({1, max(1, several)})]


def _longest_prompt(info: EngineInfo, max_tokens: int) -> int:
    """The longest prompt that one pass takes and that leaves room for `max_tokens`; may be below 1."""
    return min(info.max_num_tokens, _longest_sequence(info) - max_tokens)


def _longest_sequence(info: EngineInfo) -> int:
    return min(info.max_seq_len, info.num_blocks * info.block_size)


class WarmUpWatch:
    """Which of the warm-up's requests are open: the engine's threads see them end, the starting thread waits."""

    def __init__(self) -> None:
        self._open: set[RequestId] = set()
        self._error: str | None = None
        self._changed = threading.Condition()

    def expect(self, request_ids: list[RequestId]) -> None:
        """Call before they are submitted."""
        with self._changed:
            self._open.update(request_ids)

    def see(self, step: StepOutputs) -> None:
        """Called with every step, for ever: costs nothing once no request of the warm-up is open."""
        if self._open:
            with self._changed:
                for output in step.outputs:
                    if output.finish_reason is not None and output.request_id in self._open:
                        self._open.discard(output.request_id)
                        if output.finish_reason is FinishReason.ERROR:
                            self._error = f"the warm-up request failed: {output.error}"
                self._changed.notify_all()

    def give_up(self, error: str) -> None:
        """No output will come any more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when all have ended; raises WarmUpFailed when one of them, or the engine, failed.

        Has no deadline of its own: the server ends a worker whose start takes too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._error is not None)
            if self._error is not None:
                raise WarmUpFailed(self._error)


class WarmUp:
    """Runs once, on the thread that started the engine and before anybody else submits.

    `watch` has to see every step of the engine. limit_s: seconds after the first token in which probes may start;
    one that has started runs to its end.
    """

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        watch: WarmUpWatch,
        limit_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._info = info
        self._watch = watch
        self._limit_s = limit_s
        self._clock = clock
        self._ids: Iterator[int] = count(FIRST_REQUEST_ID)
        self._random = random.Random(0)  # the same prompts on every worker and in every run

    def run(self) -> None:
        """Blocks until the engine has shown what it can; raises WarmUpFailed."""
        self._run(first_token(self._info))
        deadline_s = self._clock() + self._limit_s
        for probe in probes(self._info):
            if self._clock() >= deadline_s:
                return
            self._run(probe)

    def _run(self, probe: Probe) -> None:
        requests = [self._request(probe) for _ in range(probe.num_sequences)]
        self._watch.expect([request.id for request in requests])
        for request in requests:
            self._engine.submit(request)
        self._watch.wait()

    def _request(self, probe: Probe) -> Request:
        # Special tokens lie at either end of a vocabulary, so prompts are made of its middle half.
        size = self._info.vocab_size
        token_ids = range(size // 4, max(size - size // 4, 1))
        prompt = array("i", self._random.choices(token_ids, k=probe.prompt_tokens))
        sampling = SamplingParams(max_tokens=probe.max_tokens, temperature=0.0, ignore_eos=True)
        salt = CACHE_SALT if self._info.supports_cache_salt else ""
        return Request(RequestId(next(self._ids)), prompt, sampling, cache_salt=salt)
