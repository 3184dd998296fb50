"""One generated sequence on its way to a client: tokens in, text out, as events or as a whole."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from trtserve.plugins.api import Finish, FinishReason, TokenLogprob
from trtserve.server.errors import EngineFailed, EngineRefused, Internal, RequestCancelled, ServeError
from trtserve.server.text.text_stream import TextStream

logger = logging.getLogger(__name__)


class Emit(Protocol):
    """Takes the new text of a choice, with the log probabilities of the tokens that came meanwhile."""

    def __call__(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> None: ...

    def prepare(self, num_choices: int) -> None:
        """Have ready what the first call needs, while there is nothing else to do. It may come too late."""

    def plain(self, choice: Choice, text: TextStream) -> Callable[[Sequence[int]], None] | None:
        """The shortest way from token ids to the client, for a plain `text` without log probabilities, once the choice
        has emitted something; None where every piece needs the call above."""


class Choice:
    """The OutputSink of one sequence.

    Tokens are collected while the worker's socket is drained and turned into text once after it (`Flusher`), so that
    tokens which are there at once become one event; those of the last message go straight through. Stop strings end the
    run through `stop`.
    """

    __slots__ = (
        "_emit",
        "_emit_plain",
        "_fail",
        "_flusher",
        "_logprobs",
        "_num_logprobs",
        "_num_plain_tokens",
        "_pending",
        "_stop",
        "_stop_token_ids",
        "_text",
        "cached_tokens",
        "finish_reason",
        "first_token_s",
        "index",
        "last_token_s",
        "stop_reason",
    )

    def __init__(
        self,
        index: int,
        text: TextStream,
        flusher: Flusher,
        emit: Emit,
        stop: Callable[[], None],
        fail: Callable[[ServeError], None],
        stop_token_ids: Collection[int] = (),
    ) -> None:
        """`stop` ends the sequence's run early; `fail` ends the whole request. stop_token_ids: the client's own, named
        as the stop reason; an end-of-sequence token is no reason to name."""
        self.index = index
        self.cached_tokens = 0
        self.first_token_s = 0.0  # time.monotonic(), 0: none yet
        self.last_token_s = 0.0
        self.finish_reason: str | None = None  # OpenAI's word, once ended
        self.stop_reason: str | int | None = None
        self._text = text
        self._flusher = flusher
        self._emit = emit
        self._stop = stop
        self._fail = fail
        self._stop_token_ids = stop_token_ids
        self._pending: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._num_logprobs = 0  # given out
        # The hot path, taken from the second piece on where nothing but text is wanted.
        self._emit_plain: Callable[[Sequence[int]], None] | None = None
        self._num_plain_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Generated tokens that the client is told of: up to the stop string, if one was met."""
        return self._num_plain_tokens + self._text.num_tokens_used

    # -------------------------------------------------------------- OutputSink

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> None:
        """Hot: the first branch is what most tokens take."""
        if self._emit_plain is not None and self._flusher.expects_no_more and not self._pending:
            self._num_plain_tokens += len(token_ids)
            try:
                self._emit_plain(token_ids)
            except Exception as error:  # one request's defect stays its own
                self.fail(error)
            return
        if not self._pending:
            self._flusher.dirty.append(self)
        self._pending += token_ids
        if logprobs:
            self._logprobs += logprobs

    def cached(self, num_tokens: int) -> None:
        self.cached_tokens = num_tokens

    # -------------------------------------------------------------- text

    def flush(self, now_s: float) -> None:
        """Turn the collected tokens into text; called by the flusher. now_s: time.monotonic()."""
        if not self.first_token_s:
            self.first_token_s = now_s
        pending, self._pending = self._pending, []
        if self._emit_plain is not None:
            self._num_plain_tokens += len(pending)
            self._emit_plain(pending)
            return
        if self.stop_reason is not None:
            return  # the text is over; the worker has not heard of it yet
        text = self._text.push(pending)
        if self._logprobs:
            self._emit_logprobs(text)
        elif text:
            self._emit(self, text, ())
            if self._text.is_plain and not self._num_logprobs:
                self._emit_plain = self._emit.plain(self, self._text)
        if self._text.stop_string is not None:
            self.stop_reason = self._text.stop_string
            self._stop()

    def _emit_logprobs(self, text: str) -> None:
        logprobs, self._logprobs = self._logprobs, []
        # Tokens behind the one that completed a stop string are not part of the answer.
        logprobs = logprobs[: self.num_tokens - self._num_logprobs]
        self._num_logprobs += len(logprobs)
        self._emit(self, text, logprobs)

    def fail(self, error: Exception) -> None:
        """Turning tokens into text failed: a defect here, which must not hurt other requests."""
        logger.error("a choice could not be emitted", exc_info=error)
        self._fail(Internal())

    def end(self, finish: Finish) -> None:
        """Give out the rest of the text. Raises what the client must be told if the engine did not end it well."""
        self.last_token_s = time.monotonic()
        if finish.is_refused:
            raise EngineRefused(finish.error or "the engine cannot serve this request")
        if finish.reason is FinishReason.ERROR:
            raise EngineFailed(finish.error or "the engine gave up on this request")
        if finish.reason is FinishReason.CANCELLED:
            raise RequestCancelled("the worker cancelled this request")
        if self.stop_reason is None:
            if self._pending:
                self.flush(time.monotonic())
            rest = self._text.finish()
            if rest:
                self._emit(self, rest, ())
            named = finish.stop_token_id if finish.stop_token_id in self._stop_token_ids else None
            self.stop_reason = self._text.stop_string if self._text.stop_string is not None else named
        self.finish_reason = (
            "length" if finish.reason is FinishReason.LENGTH and self._text.stop_string is None else "stop"
        )

    def release(self) -> None:
        """The request is over: let go of everything that refers back to this choice, so that reference counting frees
        them all at once and the garbage collector has nothing to find."""
        self._emit, self._emit_plain = _nowhere, None
        self._stop, self._fail = _nothing, _nobody


class _Nowhere:
    """Where the tokens of a released choice go, should any still come."""

    def __call__(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        pass

    def prepare(self, num_choices: int) -> None:
        pass

    def plain(self, choice: Choice, text: TextStream) -> Callable[[Sequence[int]], None] | None:
        return None


_nowhere = _Nowhere()


def _nothing() -> None:
    pass


def _nobody(error: ServeError) -> None:
    pass


class Flusher:
    """The choices with tokens that are not text yet. One per server; the link calls `flush` after every drain."""

    def __init__(self) -> None:
        self.dirty: list[Choice] = []
        self.expects_no_more = False  # tokens that come now need not wait for others

    def expect_no_more(self) -> None:
        """The last message of this drain comes next."""
        self.expects_no_more = True

    def flush(self) -> None:
        self.expects_no_more = False
        if not self.dirty:
            return
        dirty, self.dirty = self.dirty, []
        now_s = time.monotonic()
        for choice in dirty:
            try:
                choice.flush(now_s)
            except Exception as error:  # one request's defect stays its own
                choice.fail(error)
