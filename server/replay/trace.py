"""Traces in Mooncake's format: one JSON object a line with `timestamp` (ms), `input_length`, `output_length` and
`hash_ids`, the ids of the prompt's blocks.

Source: Mooncake, FAST 2025, https://github.com/kvcache-ai/Mooncake (FAST25-release/traces). Equal ids are equal blocks
after equal blocks. A trace has no text; `TraceRequest.prompt` makes tokens that are equal exactly where the ids are.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec

from trtserve.plugins.api import TokenIds
from trtserve.server.replay.engine import own_token

BLOCK_SIZE = 512
"""Tokens that an id stands for in Mooncake's own traces."""

_LARGEST_ID = 2**31 - 1

_Length = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_HashId = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_ID)]


class TraceError(Exception):
    """A trace cannot be replayed; the text names file, line and reason."""


class _Line(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: _Length
    output_length: _Length
    hash_ids: list[_HashId]


_DECODER = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line of a trace."""

    number: int  # from 0, in the order of the file
    arrival_ms: float  # as the trace has it
    input_tokens: int
    output_tokens: int
    hash_ids: array[int]  # of the prompt's blocks; the last one may be partial

    def prompt(self, block_size: int = BLOCK_SIZE) -> TokenIds:
        """int32[input_tokens]: each full block is its id again and again, a partial last one is the request's own."""
        tokens = array("i")
        full, rest = divmod(self.input_tokens, block_size)
        for hash_id in self.hash_ids[:full]:
            tokens += array("i", (hash_id,)) * block_size
        tokens += array("i", (own_token(self.number),)) * rest
        return tokens


def read_trace(path: Path, block_size: int = BLOCK_SIZE, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a file, in its order; every line is one. Raises TraceError."""
    try:
        with path.open("rb") as lines:
            trace = [_parse(line, number, path, block_size) for number, line in enumerate(islice(lines, limit))]
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}") from error
    if not trace:
        raise TraceError(f"{path}: holds no request")
    return trace


def _parse(line: bytes, number: int, path: Path, block_size: int) -> TraceRequest:
    try:
        row = _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}:{number + 1}: {error}") from None
    needed = -(-row.input_length // block_size)
    if len(row.hash_ids) != needed:
        raise TraceError(
            f"{path}:{number + 1}: has {len(row.hash_ids)} hash_ids, but {row.input_length} tokens are {needed} blocks "
            f"of {block_size}; --trace-block-size says how many tokens an id stands for"
        )
    return TraceRequest(number, row.timestamp, row.input_length, row.output_length, array("i", row.hash_ids))
