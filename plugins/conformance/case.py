"""What an engine's author tells the conformance suite, and the running engine that its tests work with."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from trtserve.plugins.api import (
    Engine,
    EngineConfig,
    EngineInfo,
    FinishReason,
    Output,
    Request,
    RequestId,
    SamplingParams,
    TokenIds,
    TokenLogprob,
)
from trtserve.plugins.conformance.sink import CollectingSink


@dataclass(frozen=True, slots=True)
class Ended:
    """All that an engine said of one request, put together."""

    token_ids: list[int]
    finish_reason: FinishReason
    stop_token_id: int | None
    cached_tokens: int | None
    logprobs: list[TokenLogprob]
    error: str | None


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """A started engine with its sink; `deadline_s` bounds every wait."""

    engine: Engine
    sink: CollectingSink
    info: EngineInfo
    eos_token_ids: tuple[int, ...]
    deadline_s: float
    _ids: Iterator[int] = field(default_factory=lambda: count(1))

    def submit(self, prompt: TokenIds, *, cache_salt: str = "", num_resumed: int = 0, **sampling: Any) -> RequestId:
        """Submit a greedy request unless `sampling` says otherwise; returns its id."""
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling})
        request_id = RequestId(next(self._ids))
        self.engine.submit(
            Request(request_id, prompt, params, self.eos_token_ids, cache_salt=cache_salt, num_resumed=num_resumed)
        )
        return request_id

    def wait(self, *request_ids: RequestId) -> None:
        """Wait until these have ended."""
        self.sink.wait_ended(request_ids, self.deadline_s)

    def ended(self, request_id: RequestId) -> Ended:
        """Wait for one request and check that its outputs are in order and end once."""
        self.wait(request_id)
        outputs = self.sink.outputs_of(request_id)
        check_order(outputs)
        last = outputs[-1]
        assert last.finish_reason is not None
        return Ended(
            token_ids=[token_id for output in outputs for token_id in output.token_ids],
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            cached_tokens=outputs[0].cached_tokens,
            logprobs=[logprob for output in outputs for logprob in output.logprobs or ()],
            error=last.error,
        )

    def generate(self, prompt: TokenIds, *, cache_salt: str = "", num_resumed: int = 0, **sampling: Any) -> Ended:
        """Submit and wait for the end."""
        return self.ended(self.submit(prompt, cache_salt=cache_salt, num_resumed=num_resumed, **sampling))


@dataclass(frozen=True, slots=True)
class EngineCase:
    """An engine to put under test.

    make: a new engine, not started, for a configuration; the suite varies num_blocks, max_num_seqs,
    enable_prefix_caching and the like. config: sizes that make a test take well under a second, with room for some
    sequences of ten blocks each. vocab_size, eos_token_ids: of the model. deadline_s: longer than any test may wait.
    """

    make: Callable[[EngineConfig], Engine]
    config: EngineConfig
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    deadline_s: float = 30.0

    @contextmanager
    def running(self, **changes: Any) -> Iterator[RunningEngine]:
        """A started engine, with these fields of `config` changed; closed at the end, and must not have failed."""
        engine, sink = self.make(replace(self.config, **changes)), CollectingSink()
        info = engine.start(sink)
        try:
            yield RunningEngine(engine, sink, info, self.eos_token_ids, self.deadline_s)
            assert not sink.failures, f"the engine failed: {sink.failures[0]!r}"
        finally:
            engine.close()

    def prompt(self, num_tokens: int, number: int = 0) -> TokenIds:
        """A prompt without end-of-sequence tokens. Prompts of other numbers have another first token."""
        usable = [token_id for token_id in range(self.vocab_size) if token_id not in self.eos_token_ids]
        return array("i", (usable[(number + place * 7919) % len(usable)] for place in range(num_tokens)))


def check_order(outputs: Sequence[Output]) -> None:
    """A request's outputs end exactly once, with the last one, and tell cached tokens at most in the first."""
    assert all(output.finish_reason is None for output in outputs[:-1]), "an output followed the final one"
    assert outputs[-1].finish_reason is not None, "the last output has no finish reason"
    assert all(output.cached_tokens is None for output in outputs[1:]), "cached_tokens came after the first output"
    assert all(output.stop_token_id is None for output in outputs[:-1]), "stop_token_id came before the end"
