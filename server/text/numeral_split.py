"""An equal form of tokenizers that isolate digits, such as SmolLM's and StarCoder's, which fastokens encodes faster.

Their pre-tokenizer has two steps: `Digits` makes each numeral a piece of its own, then `ByteLevel` splits the pieces by
GPT-2's pattern. fastokens does the second step by an engine that backtracks. One `Split` by a pattern that knows of
numerals gives the same pieces, by PCRE2 compiled to machine code, in about half the time. `Digits` stays behind it,
where it finds nothing left to do: without it fastokens would take a way on which it remembers words, up to some 70 MiB
in each thread, and fails at bytes that the vocabulary lacks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from itertools import groupby

import orjson
import tokenizers
from tokenizers.pre_tokenizers import Digits

_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_FORMER = {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}

_SPACES = r"\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
"""Unicode's white space; PCRE2 counts U+180E to it."""

_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    r"|[{numerals}]"
    r"| ?\p{{L}}+"
    r"| ?[^{spaces}\p{{L}}{numerals}]+"
    r"|[{spaces}]+(?![^{spaces}{numerals}])"
    r"|[{spaces}]+"
)
"""GPT-2's, where a numeral is one piece without a space before it, and spaces before it end as if the text did."""

_PLANES = 0x20000  # all numerals are in the first two


def faster_form(backend: tokenizers.Tokenizer) -> str | None:
    """The tokenizer.json of an equal tokenizer, None if this one is none of these. Takes 0.1 s."""
    former = backend.pre_tokenizer.__getstate__() if backend.pre_tokenizer is not None else b"null"
    if orjson.loads(former) != _FORMER:
        return None
    numerals = r"\p{N}" + "".join(_ranges(_newer_numerals()))
    split = {
        "type": "Split",
        "pattern": {"Regex": _PATTERN.format(numerals=numerals, spaces=_SPACES)},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = [split, _DIGITS, _BYTES | {"use_regex": False}]
    form = orjson.dumps({"type": "Sequence", "pretokenizers": steps}).decode()
    return backend.to_str().replace(former.decode(), form, 1)


def _newer_numerals() -> Iterator[int]:
    """Those that `tokenizers` knows and an older Unicode does not, Python's or PCRE2's."""
    unknown = [chr(code) for code in range(_PLANES) if unicodedata.category(chr(code)) == "Cn"]
    pieces = Digits(individual_digits=True).pre_tokenize_str("x".join(unknown))
    return (ord(piece) for piece, _ in pieces if len(piece) == 1 and piece != "x")


def _ranges(codes: Iterable[int]) -> Iterator[str]:
    """As in a character class; `codes` in order."""
    for _, run in groupby(enumerate(codes), lambda numbered: numbered[1] - numbered[0]):
        members = [code for _, code in run]
        yield f"\\x{{{members[0]:x}}}-\\x{{{members[-1]:x}}}"
