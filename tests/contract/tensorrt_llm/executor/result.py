"""`tensorrt_llm.executor.result`: one object for one request, updated in place; and the shared queues of iterations."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.stand_in.environment import variable
from tensorrt_llm.stand_in.violations import documented, violated


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class Response:
    """One step of one sequence, as the executor sends it. With `error` nothing else counts."""

    sequence_index: int = 0
    new_tokens: list[int] = field(default_factory=list)
    new_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    hidden: int = 0  # leading tokens that the difference leaves out
    trimmed: int = 0  # matched stop tokens that leave token_ids again
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    is_final: bool = False  # of the whole request
    cached_tokens: int = 0
    decoding_iter: int = 0
    avg_decoded_tokens_per_iter: float | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    disaggregated_params: DisaggregatedParams | None = None
    perf_metrics: Any = None
    error: Exception | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: Any = None
    additional_generation_outputs: Any = None
    disaggregated_params: DisaggregatedParams | None = None
    request_perf_metrics: Any = None
    _postprocess_result: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return self.logprobs[self._last_logprobs_len :]


class GenerationResult:
    """Awaitable, iterable and async-iterable; each step gives this very object, which has changed."""

    def __init__(
        self, request_id: int, prompt_token_ids: list[int], num_sequences: int, has_logprobs: bool,
        disaggregated_params: DisaggregatedParams | None, loop: asyncio.AbstractEventLoop | None,
        abort: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids = prompt_token_ids
        self.finished = False
        self.context_logits = None
        self.mm_embedding_handle = None
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter: float | None = None
        self.metrics_dict: dict[str, Any] = {}
        self.disaggregated_params = disaggregated_params
        self._outputs = [CompletionOutput(index) for index in range(num_sequences)]
        self._has_logprobs = has_logprobs
        self._loop = loop
        self._responses: deque[Response] = deque()
        self._arrived = asyncio.Event() if loop is not None else None
        self._sync_responses: queue.SimpleQueue[Response] = queue.SimpleQueue()
        self._abort = abort
        self._aborted = False
        self._reports_early_ends = variable("EARLY_ENDS") == "1"

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._outputs

    def aborted(self) -> bool:
        return self._aborted

    def abort(self) -> None:
        """Ask the executor to end the request; a last response says 'cancelled'. Harmless for one that has ended."""
        self._aborted = True
        self._abort(self.request_id)

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self.finished:
            raise StopAsyncIteration
        await self._step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    async def aresult(self) -> GenerationResult:
        while not self.finished:
            await self._step()
        return self

    def __iter__(self) -> GenerationResult:
        return self

    def __next__(self) -> GenerationResult:
        if self.finished:
            raise StopIteration
        self._sync_step(None)
        return self

    def result(self, timeout: float | None = None) -> GenerationResult:
        while not self.finished:
            self._sync_step(timeout)
        return self

    def _put(self, response: Response) -> None:
        """On the loop's thread where there is a loop, on any otherwise."""
        if self._arrived is None:
            self._sync_responses.put(response)
        else:
            self._responses.append(response)
            self._arrived.set()

    async def _step(self) -> None:
        if self._arrived is None:
            raise documented(AssertionError("The asyncio event loop was not present during initialization"))
        if asyncio.get_running_loop() is not self._loop:
            raise violated("a result is read from another event loop than the one it was made in")
        while not self._responses:
            self._arrived.clear()
            await self._arrived.wait()
        self._handle(self._responses.popleft())

    def _sync_step(self, timeout: float | None) -> None:
        if self._arrived is not None:
            raise violated("a result that was made in an event loop is read without it: this would block the loop")
        self._handle(self._sync_responses.get(timeout=timeout))

    def _handle(self, response: Response) -> None:
        if response.error is not None:
            self.finished = True
            raise response.error
        output = self._outputs[response.sequence_index]
        self.cached_tokens = response.cached_tokens
        self.decoding_iter = response.decoding_iter
        self.avg_decoded_tokens_per_iter = response.avg_decoded_tokens_per_iter
        output._last_token_ids_len = len(output.token_ids) + response.hidden
        output._last_logprobs_len = len(output.logprobs)
        output.token_ids.extend(response.new_tokens)
        if self._has_logprobs:
            output.logprobs.extend(response.new_logprobs)
            gained = sum(next(iter(entry.values())).logprob for entry in response.new_logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + gained
        if response.prompt_logprobs is not None:
            output.prompt_logprobs = response.prompt_logprobs
        if response.disaggregated_params is not None:
            output.disaggregated_params = self.disaggregated_params = response.disaggregated_params
        self.finished = response.is_final
        if self.finished or response.finish_reason == "cancelled" or self._reports_early_ends:
            self._end(output, response)

    def _end(self, output: CompletionOutput, response: Response) -> None:
        """As documented only with the request's last response: a sequence (n > 1) that ended before another one keeps
        no finish reason and its stop tokens."""
        output.finish_reason, output.stop_reason = response.finish_reason, response.stop_reason
        output.request_perf_metrics = response.perf_metrics
        if response.trimmed:
            del output.token_ids[-response.trimmed :]  # and no log probability: there are more of them from here on
