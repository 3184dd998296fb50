"""What each token stands for, in bytes, as its tokenizer's decoder sees it.

Byte-level BPE writes every byte as one printable character (the alphabet of GPT-2's encoder.py); sentencepiece writes a
space as U+2581 and bytes without a piece of their own as ``<0xE4>``. A token may be part of a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(StrEnum):
    """How a vocabulary writes bytes."""

    BYTE_LEVEL = "byte level"
    SENTENCEPIECE = "sentencepiece"
    PLAIN = "plain"


class TokenBytes(dict[int, bytes]):
    """token id -> its bytes, filled as tokens are asked for, so at most one entry for each id of the vocabulary.

    Ids in `silent` and ids without a token are b"". `json` is for detokenizers to keep what they found out about
    tokens, by id: their text inside a JSON string.
    """

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        spelling: Spelling,
        num_tokens: int,
        silent: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.json: list[bytes | None] = [None] * num_tokens
        self._token_of = token_of
        self._read = {
            Spelling.BYTE_LEVEL: byte_level_reader(),
            Spelling.SENTENCEPIECE: _sentencepiece_bytes,
            Spelling.PLAIN: str.encode,
        }[spelling]
        self._silent = silent

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._silent else self._token_of(token_id)
        data = self[token_id] = b"" if token is None else self._read(token)
        return data


def spelling_of(backend: tokenizers.Tokenizer) -> Spelling:
    """Which spelling a tokenizer's decoder undoes."""
    decoder = backend.decoder
    kinds = set(_decoder_kinds(json.loads(decoder.__getstate__()))) if decoder is not None else set()
    if kinds == {"ByteLevel"}:
        return Spelling.BYTE_LEVEL
    if kinds & {"ByteFallback", "Metaspace"}:
        return Spelling.SENTENCEPIECE
    return Spelling.PLAIN


def byte_level_reader() -> Callable[[str], bytes]:
    """The function from a byte-level token to its bytes; a token with another character in it stands for its UTF-8."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    byte_of = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}

    def read(token: str) -> bytes:
        try:
            return bytes([byte_of[character] for character in token])
        except KeyError:
            return token.encode()

    return read


def _sentencepiece_bytes(token: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(token)
    return bytes.fromhex(match[1]) if match else token.replace("\u2581", " ").encode()


def _decoder_kinds(decoder: dict[str, Any]) -> Iterator[str]:
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoder_kinds(inner)
    else:
        yield str(decoder["type"])
