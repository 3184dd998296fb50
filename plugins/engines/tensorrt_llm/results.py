"""From the one object that TensorRT-LLM updates in place to what each step has new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtserve.plugins.api import FinishReason, Output, Request, TokenLogprob
from trtserve.plugins.engines.tensorrt_llm.sampling import NO_TOKEN, end_id, ending_token_ids

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
    "not_finished": FinishReason.LENGTH,  # of a context phase: there is more to generate, elsewhere
}


class ResultNotUnderstood(Exception):
    """A result is not what it is documented to be; what else the executor does may be right."""


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
        self._stop_token_ids = frozenset(ending_token_ids(request))
        self._num_skipped = self._num_read = num_skipped
        self._last_token_id: int | None = None  # of those given
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
        """None where there is nothing new. Raises ResultNotUnderstood; nothing counts as read then."""
        try:
            return self._read(result)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ResultNotUnderstood(f"The engine's result is not understood: {error!r}") from error

    def _read(self, result: Any) -> Output | None:
        output = result.outputs[0]
        begin, new = self._num_read, [int(token_id) for token_id in output.token_ids[self._num_read :]]
        reason = _reason(result, output)
        stop_token_id = None
        if reason is FinishReason.STOP:
            new, stop_token_id = self._ending(output, new)
        if not new and reason is None:
            return None
        read = Output(
            self._request.id,
            new,
            reason,
            stop_token_id,
            int(getattr(result, "cached_tokens", 0) or 0) if self._is_first else None,
            self._logprobs(output, new, begin),
            error=_error(output) if reason is FinishReason.ERROR else None,
        )
        self._num_read = begin + len(new)
        self._last_token_id = new[-1] if new else self._last_token_id
        self._is_first = False
        self.num_tokens += len(new)
        self.has_ended = reason is not None
        return read

    def _ending(self, output: Any, new: list[int]) -> tuple[list[int], int | None]:
        """The last tokens with the one that ended the sequence, which a version may leave out of `token_ids`, and that
        token."""
        last = new[-1] if new else self._last_token_id
        stop_token_id = self._stop_token(output, last)
        if stop_token_id is None or last == stop_token_id:
            return new, stop_token_id
        if self._can_add(output):
            return [*new, stop_token_id], stop_token_id
        return new, None

    def _stop_token(self, output: Any, last: int | None) -> int | None:
        """The token that ended the sequence."""
        if isinstance(output.stop_reason, int):
            return output.stop_reason
        if last in self._stop_token_ids:
            return last
        return None if self._end_id == NO_TOKEN else self._end_id

    def _can_add(self, output: Any) -> bool:
        """Whether a stop token that is not in `token_ids` can be reported: with log probabilities only where there is
        one for it."""
        return self._request.sampling.logprobs is None or len(output.logprobs or ()) > len(output.token_ids)

    def _logprobs(self, output: Any, new: Sequence[int], begin: int) -> tuple[TokenLogprob, ...] | None:
        """Raises ValueError where they are not those of the tokens."""
        wanted = self._request.sampling.logprobs
        if wanted is None or not new:
            return None
        # Of the tokens that a prefill handed over, 1.2 has no log probabilities.
        for num_missing in sorted({0, self._num_skipped}):
            first = max(0, begin - num_missing)
            entries = output.logprobs[first : first + len(new)]
            if len(entries) == len(new) and all(map(_is_of, entries, new)):
                return tuple(_logprob(token_id, entry, wanted) for token_id, entry in zip(new, entries, strict=True))
        raise ValueError("a result without the log probabilities that were asked for")


def _reason(result: Any, output: Any) -> FinishReason | None:
    if not result.finished:
        return None
    return _REASONS.get(output.finish_reason, FinishReason.ERROR)


def _is_of(entry: Mapping[int, Any] | float, token_id: int) -> bool:
    return not isinstance(entry, Mapping) or token_id in entry


def _logprob(token_id: int, entry: Mapping[int, Any] | float, wanted: int) -> TokenLogprob:
    if not isinstance(entry, Mapping):
        return TokenLogprob(token_id, float(entry))  # the simple form of later versions
    ranked = sorted(((key, float(value.logprob)) for key, value in entry.items()), key=lambda item: -item[1])
    return TokenLogprob(token_id, float(entry[token_id].logprob), tuple(ranked[:wanted]))


def _error(output: Any) -> str:
    if output.finish_reason == "timeout":
        return "The engine's own time limit ended this request."
    return f"The engine ended this request for a reason unknown here: {output.finish_reason!r}."
