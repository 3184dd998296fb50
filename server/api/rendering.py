"""OpenAI's objects as bytes: chunks of a stream, rendered from a ready-made envelope, and whole answers.

In a stream the envelope around a piece of text is the same for every chunk of a choice, so it is rendered once; a
chunk then costs one `orjson.dumps` of its text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import orjson

from trtserve.plugins.api import TokenLogprob
from trtserve.server.api.choice import Choice
from trtserve.server.api.stream import EventStream
from trtserve.server.text.detokenizer import Detokenizer
from trtserve.server.text.text_stream import TextStream
from trtserve.server.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a whole request: each prompt once, every choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """What every object of one answer shares."""

    id: str
    model: str
    created: int
    service_tier: str | None = None  # of a request that names one

    @classmethod
    def new(cls, identifier: str, model: str, service_tier: str | None = None) -> Envelope:
        return cls(identifier, model, int(time.time()), service_tier)

    def fields(self, kind: str) -> dict[str, Any]:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return fields if self.service_tier is None else fields | {"service_tier": self.service_tier}


class Shape(Protocol):
    """What differs between chat and completions. One object per answer."""

    chunk_kind: str
    whole_kind: str

    def empty_chunk_choice(self, index: int) -> dict[str, Any]:
        """A chunk's choice with `TEXT_MARK` where the text goes."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of a chunk that comes before a choice's text, if there is one."""

    def closing(self, index: int) -> dict[str, Any]:
        """A chunk's choice without text."""

    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]: ...

    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A choice of a whole answer; finish_reason is filled in by the caller."""


TEXT_MARK = "\x00text\x00"
"""JSON renders it with escapes, so no text of a client can look like it inside the envelope."""


class ChunkRenderer:
    """The SSE events of one streamed answer."""

    def __init__(
        self, envelope: Envelope, shape: Shape, include_usage: bool, continuous_usage: Callable[[], Usage] | None
    ) -> None:
        """`continuous_usage` gives the usage so far, to be put into every chunk; None: it is not asked for."""
        self._fields = envelope.fields(shape.chunk_kind)
        self._shape = shape
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._frames: dict[int, tuple[bytes, bytes]] = {}
        self._prepared: dict[int, tuple[tuple[bytes, bytes], bytes]] = {}  # frames and what `open` returns

    def prepare(self, index: int) -> None:
        """Have ready what `open` needs of a choice, unless it tells of the tokens so far."""
        if self._continuous_usage is None:
            self._prepared[index] = self._opening(index)

    def text(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The event, or events, for a piece of text of a choice."""
        frame = self._frames.get(choice.index)
        if frame is not None and not logprobs and self._continuous_usage is None:
            return frame[0] + orjson.dumps(text) + frame[1]
        opening = b"" if frame is not None else self.open(choice)
        if not logprobs and self._continuous_usage is None:
            prefix, suffix = self._frames[choice.index]
            return opening + prefix + orjson.dumps(text) + suffix
        body = self._shape.empty_chunk_choice(choice.index)
        _put_text(body, text)
        if logprobs:
            body["logprobs"] = self._shape.logprobs(choice, logprobs)
        return opening + self._event([body])

    def open(self, choice: Choice) -> bytes:
        """What goes before a choice's text; its frame is ready afterwards."""
        prepared = self._prepared.pop(choice.index, None)
        self._frames[choice.index], opening = prepared or self._opening(choice.index)
        return opening

    def _opening(self, index: int) -> tuple[tuple[bytes, bytes], bytes]:
        rendered = self._event([self._shape.empty_chunk_choice(index)])
        prefix, _, suffix = rendered.partition(orjson.dumps(TEXT_MARK))
        opening = self._shape.opening(index)
        return (prefix, suffix), b"" if opening is None else self._event([opening])

    def end(self, choice: Choice) -> bytes:
        """The event that tells how a choice ended."""
        opening = b"" if choice.index in self._frames else self.open(choice)
        body = self._shape.closing(choice.index) | {"finish_reason": choice.finish_reason}
        if choice.stop_reason is not None:
            body["stop_reason"] = choice.stop_reason
        return opening + self._event([body])

    def frame(self, choice: Choice) -> tuple[bytes, bytes] | None:
        """What goes before and behind the JSON string of a piece of text, once the choice was opened; None where
        each event differs in more than that."""
        return None if self._continuous_usage is not None else self._frames.get(choice.index)

    def usage(self, usage: Usage) -> bytes:
        """The last event before [DONE], for include_usage."""
        return b"data: " + orjson.dumps(self._fields | {"choices": [], "usage": usage.body()}) + b"\n\n"

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        body = self._fields | {"choices": choices}
        if self._continuous_usage is not None:
            body["usage"] = self._continuous_usage().body()
        elif self._include_usage:
            body["usage"] = None
        return b"data: " + orjson.dumps(body) + b"\n\n"


def _put_text(body: dict[str, Any], text: str) -> None:
    if "delta" in body:
        body["delta"] = {"content": text}
    else:
        body["text"] = text


class ChatShape:
    """Chat completions."""

    chunk_kind = "chat.completion.chunk"
    whole_kind = "chat.completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def empty_chunk_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"content": TEXT_MARK}, "logprobs": None, "finish_reason": None}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def closing(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None}

    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": [self._entry(entry) for entry in entries], "refusal": None}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return self._token(entry.token_id, entry.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "logprob": finite(logprob), "bytes": list(raw)}

    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs}


class CompletionShape:
    """Legacy completions."""

    chunk_kind = whole_kind = "text_completion"

    def __init__(
        self, tokenizer: Tokenizer, echoes: Sequence[str], detokenizers: Callable[[int], Detokenizer] | None = None
    ) -> None:
        """echoes[i]: the prompt's text in front of choice i, "" where nothing is echoed. detokenizers: makes one for
        the tokens of choice i as its text has them; needed for logprobs only."""
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._new_detokenizer = detokenizers
        self._offsets: dict[int, tuple[int, Detokenizer]] = {}

    def empty_chunk_choice(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": TEXT_MARK, "logprobs": None, "finish_reason": None}

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echoes[index]
        return {"index": index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def closing(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None}

    def logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The chosen token is among the top ones, whether or not it is one of the most likely."""
        return {
            "tokens": [self._tokenizer.token_text(entry.token_id) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                {
                    self._tokenizer.token_text(token_id): finite(logprob)
                    for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob))
                }
                for entry in entries
            ],
            "text_offset": self._text_offsets(choice.index, entries),
        }

    def _text_offsets(self, index: int, entries: Sequence[TokenLogprob]) -> list[int]:
        """Characters of the choice's text before each token. Tokens within one character have the same place."""
        if index not in self._offsets:
            assert self._new_detokenizer is not None
            self._offsets[index] = len(self._echoes[index]), self._new_detokenizer(index)
        offset, detokenizer = self._offsets[index]
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(detokenizer.push((entry.token_id,)))
        self._offsets[index] = offset, detokenizer
        return offsets

    def whole(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": self._echoes[index] + text, "logprobs": logprobs}


class StreamEmitter:
    """Renders what choices emit, and writes it to the client's stream."""

    def __init__(self, renderer: ChunkRenderer, stream: EventStream) -> None:
        self._renderer = renderer
        self._stream = stream

    def prepare(self, num_choices: int) -> None:
        self._stream.prepare()
        for index in range(num_choices):
            self._renderer.prepare(index)

    def __call__(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        self._stream.write(self._renderer.text(choice, text, logprobs))

    def plain(self, choice: Choice, text: TextStream) -> Callable[[Sequence[int]], None] | None:
        frame = self._renderer.frame(choice)
        if frame is None:
            return None
        prefix, suffix = frame
        write, decode = self._stream.framed(prefix + b'"', b'"' + suffix), text.plain_json()

        def emit(token_ids: Sequence[int]) -> None:
            piece = decode(token_ids)
            if piece:
                write(piece)

        return emit


class WholeAnswer:
    """Collects the text of all choices for an answer that is not streamed."""

    def __init__(self, envelope: Envelope, shape: Shape) -> None:
        self._fields = envelope.fields(shape.whole_kind)
        self._shape = shape
        self._texts: dict[int, list[str]] = {}
        self._logprobs: dict[int, list[TokenLogprob]] = {}

    def prepare(self, num_choices: int) -> None:
        pass

    def __call__(self, choice: Choice, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        self._texts.setdefault(choice.index, []).append(text)
        if logprobs:
            self._logprobs.setdefault(choice.index, []).extend(logprobs)

    def plain(self, choice: Choice, text: TextStream) -> Callable[[Sequence[int]], None] | None:
        append, decode = self._texts.setdefault(choice.index, []).append, text.plain_decoder()
        return lambda token_ids: append(decode(token_ids))

    def body(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        rendered = [self._choice(choice) for choice in choices]
        return orjson.dumps(self._fields | {"choices": rendered, "usage": usage.body()})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        entries = self._logprobs.get(choice.index)
        logprobs = None if entries is None else self._shape.logprobs(choice, entries)
        body = self._shape.whole(choice.index, "".join(self._texts.get(choice.index, ())), logprobs)
        body["finish_reason"] = choice.finish_reason
        if choice.stop_reason is not None:
            body["stop_reason"] = choice.stop_reason
        return body


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI gives -9999 for what cannot happen."""
    return max(logprob, -9999.0)
