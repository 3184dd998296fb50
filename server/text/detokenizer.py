"""Incremental detokenizers: tokens in, the text that is certain so far out.

What they give, joined, is what decoding all tokens at once gives, U+FFFD for broken UTF-8 included. Of a character that
is not whole yet nothing is given; `finish` turns what is left of it into U+FFFD.

Two of them, since decoders differ: with byte-level BPE a token is its bytes, and a UTF-8 decoder is all it takes; where
the text of a token depends on its neighbours (sentencepiece's leading space), `tokenizers`' own stream decodes.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

import orjson
import tokenizers
from tokenizers.decoders import DecodeStream

from trtserve.server.text.token_bytes import TokenBytes

MAX_CONTEXT_TOKENS = 8
_MAX_HELD_TOKENS = 64  # no character has so many; what is held beyond it is not going to become one


class Detokenizer(Protocol):
    """One sequence's text. `push` in order, then `finish` once."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens made certain; often '' within a character."""

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        """As `push`, but the text as it stands inside a JSON string, in UTF-8 and without the quotes."""

    def finish(self) -> str:
        """What was held back."""


class ByteDetokenizer:
    """For byte-level vocabularies. A token costs a look-up and a call to the UTF-8 decoder, or, as JSON and once it
    was met between whole characters, a look-up alone."""

    __slots__ = ("_bytes_of", "_held", "_json_of")

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of
        self._json_of = bytes_of.json
        self._held = b""  # the beginning of a character, at most 3 bytes

    def push(self, token_ids: Sequence[int]) -> str:
        bytes_of = self._bytes_of
        if len(token_ids) == 1:
            data = bytes_of[token_ids[0]]
        else:
            data = b"".join([bytes_of[token_id] for token_id in token_ids])
        if self._held:
            data = self._held + data
        text, num_used = utf_8_decode(data, "replace", False)
        self._held = data[num_used:]
        return text

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        is_alone = len(token_ids) == 1 and not self._held
        if is_alone:
            known = self._json_of[token_ids[0]] if token_ids[0] < len(self._json_of) else None
            if known is not None:
                return known
        data = orjson.dumps(self.push(token_ids))[1:-1]
        if is_alone and not self._held and token_ids[0] < len(self._json_of):
            # Between whole characters a token's text is always the same.
            self._json_of[token_ids[0]] = data
        return data

    def finish(self) -> str:
        text, _ = utf_8_decode(self._held, "replace", True)
        self._held = b""
        return text


class StreamDetokenizer:
    """For every other vocabulary, on `tokenizers.decoders.DecodeStream`.

    context: the prompt's last ids, at most `MAX_CONTEXT_TOKENS` (the first step decodes all of them); the text is what
    follows theirs. Context that ends within a character is left out: the stream would repeat its text.
    """

    __slots__ = ("_backend", "_context", "_held", "_skip_special_tokens", "_stream")

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool, context: Sequence[int] = ()) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._held: list[int] = []  # pushed and not yet seen in the text
        self._context: list[int] = []
        self._stream = DecodeStream([], skip_special_tokens)
        self._begin_behind(list(context))

    def push(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        self._held += ids
        try:
            text = self._stream.step(self._backend, ids)
        except Exception:
            # The stream gives up when later tokens change text that it gave out, as broken bytes after whole
            # characters do with byte fallback. What went out stays; what follows is decoded afresh.
            return self._skip_ahead()
        if text is None:
            return "" if len(self._held) <= _MAX_HELD_TOKENS else self._skip_ahead()
        self._context, self._held = self._held, []
        return text

    def push_json(self, token_ids: Sequence[int]) -> bytes:
        return orjson.dumps(self.push(token_ids))[1:-1]

    def finish(self) -> str:
        text = self._held_text() if self._held else ""
        self._held = []
        return text

    def _skip_ahead(self) -> str:
        """Give out what is held as it is, and go on behind it."""
        text, context = self._held_text(), self._held[-MAX_CONTEXT_TOKENS:]
        self._held = []
        self._begin_behind(context)
        return text

    def _held_text(self) -> str:
        before = self._decode(self._context)
        whole = self._decode(self._context + self._held)
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._held)

    def _begin_behind(self, context: list[int]) -> None:
        text = self._decode(context)
        # Context that is silent, or ends within a character, would make the stream repeat or swallow text.
        self._context = context if text and not text.endswith("\ufffd") else []
        self._stream = DecodeStream(self._context, self._skip_special_tokens)

    def _decode(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, self._skip_special_tokens))
