"""From the one object that TensorRT-LLM updates in place to what each step has new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtserve.plugins.api import FinishReason, Output, Request, TokenLogprob
from trtserve.plugins.engines.tensorrt_llm.sampling import NO_TOKEN, end_id

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
    "not_finished": FinishReason.LENGTH,  # of a context phase: there is more to generate, elsewhere
}


class ResultReader:
    """Reads one request's results, in order; `read` once after each step of the iteration.

    `token_ids` and `logprobs` there hold everything since the beginning, and a step may bring several tokens or none,
    so only the length that was read before is remembered (the `*_diff` properties repeat themselves where several
    sequences share a request).

    num_skipped: leading tokens that the result repeats and the client has already.
    """

    def __init__(self, request: Request, num_skipped: int = 0) -> None:
        self._request = request
        self._end_id = end_id(request)
        self._num_skipped = self._num_read = num_skipped
        self._is_first = True
        self.has_ended = False
        self.num_tokens = 0  # given, those skipped not counted

    @property
    def num_skipped(self) -> int:
        return self._num_skipped

    @num_skipped.setter
    def num_skipped(self, count: int) -> None:
        """Only before the first `read`."""
        self._num_skipped = self._num_read = count

    def read(self, result: Any) -> Output | None:
        """None where there is nothing new."""
        output = result.outputs[0]
        begin, token_ids = self._num_read, list(output.token_ids)
        reason = self._reason(result, output)
        new = token_ids[begin:]
        stop_token_id = None
        if reason is FinishReason.STOP:
            stop_token_id = self._stop_token(output, token_ids)
            if stop_token_id is not None and (not new or new[-1] != stop_token_id):
                new = [*new, stop_token_id] if self._can_add(output) else new
                stop_token_id = stop_token_id if new and new[-1] == stop_token_id else None
        if not new and reason is None:
            return None
        self._num_read = begin + len(new)
        self.num_tokens += len(new)
        self.has_ended = reason is not None
        is_first, self._is_first = self._is_first, False
        return Output(
            self._request.id,
            new,
            reason,
            stop_token_id,
            int(getattr(result, "cached_tokens", 0) or 0) if is_first else None,
            self._logprobs(output, new, begin),
            error=_error(output) if reason is FinishReason.ERROR else None,
        )

    def _reason(self, result: Any, output: Any) -> FinishReason | None:
        if not result.finished:
            return None
        return _REASONS.get(output.finish_reason, FinishReason.ERROR)

    def _stop_token(self, output: Any, token_ids: Sequence[int]) -> int | None:
        """The token that ended the sequence."""
        if isinstance(output.stop_reason, int):
            return output.stop_reason
        if self._end_id != NO_TOKEN:
            return self._end_id
        return None

    def _can_add(self, output: Any) -> bool:
        """Whether the stop token, which this version leaves out of `token_ids`, can be reported: with log
        probabilities only where there is one for it."""
        return self._request.sampling.logprobs is None or len(output.logprobs or ()) > len(output.token_ids)

    def _logprobs(self, output: Any, new: Sequence[int], begin: int) -> tuple[TokenLogprob, ...] | None:
        wanted = self._request.sampling.logprobs
        if wanted is None or not new:
            return None
        # Of the tokens that a prefill handed over, 1.2 has no log probabilities.
        begin -= max(0, len(output.token_ids) - len(output.logprobs))
        entries = output.logprobs[begin : begin + len(new)]
        return tuple(_logprob(token_id, entry, wanted) for token_id, entry in zip(new, entries, strict=True))


def _logprob(token_id: int, entry: Mapping[int, Any] | float, wanted: int) -> TokenLogprob:
    if not isinstance(entry, Mapping):
        return TokenLogprob(token_id, float(entry))  # the simple form of later versions
    ranked = sorted(((key, float(value.logprob)) for key, value in entry.items()), key=lambda item: -item[1])
    return TokenLogprob(token_id, float(entry[token_id].logprob), tuple(ranked[:wanted]))


def _error(output: Any) -> str:
    if output.finish_reason == "timeout":
        return "The engine's own time limit ended this request."
    return f"The engine ended this request for a reason unknown here: {output.finish_reason!r}."
