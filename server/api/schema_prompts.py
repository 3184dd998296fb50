"""Prompts, token ids and biases of a body, by hand.

pydantic would walk a union of lists once for each of its members, and list every bad item of a large object before it
tells the first.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Any

import msgspec

from trtserve.plugins.api import TokenIds
from trtserve.server.api.schema_bodies import MAX_BIASES
from trtserve.server.api.schema_problems import shown
from trtserve.server.errors import InvalidRequest

_INT32_MAX = 2**31 - 1


def parse_prompts(value: object, vocab_size: int | None) -> tuple[str | TokenIds, ...]:
    """The prompts of a completion: a string, token ids, or a list of strings or of lists of token ids.

    vocab_size: the bound of token ids; None leaves it at 32 bits. Raises InvalidRequest for all else, and for
    empty prompts.
    """
    if isinstance(value, str):
        return (_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidRequest(
            f"`prompt` is {shown(value)}; send a string, a list of strings, or token ids.",
            param="prompt",
            code="invalid_type",
        )
    if not value:
        raise _empty("prompt")
    if isinstance(value[0], str):
        return tuple(_text(text, f"prompt[{index}]") for index, text in enumerate(value))
    if isinstance(value[0], list):
        return tuple(_nonempty_ids(ids, f"prompt[{index}]", vocab_size) for index, ids in enumerate(value))
    return (_nonempty_ids(value, "prompt", vocab_size),)


def parse_token_ids(value: object, param: str, vocab_size: int | None) -> TokenIds:
    """A list of token ids as int32[len(value)]; empty lists are fine. Raises InvalidRequest for all else."""
    if not isinstance(value, list):
        raise InvalidRequest(
            f"`{param}` is {shown(value)}; send a list of token ids.", param=param, code="invalid_type"
        )
    most = _INT32_MAX if vocab_size is None else vocab_size - 1
    try:
        # One pass in C, true for 1 and 1.0 refused: a prompt can have 100,000 ids.
        msgspec.convert(value, list[Annotated[int, msgspec.Meta(ge=0, le=most)]])
    except msgspec.ValidationError:
        raise _bad_id(value, param, most) from None
    return array("i", value)


def parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs of an object with token ids as its keys. The vocabulary is not looked at."""
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"`logit_bias` is {shown(value)} and must be an object.", param="logit_bias", code="invalid_type"
        )
    if len(value) > MAX_BIASES:
        raise InvalidRequest(f"`logit_bias` has {len(value)} entries; send {MAX_BIASES} or less.", param="logit_bias")
    return tuple(_bias(key, bias) for key, bias in value.items())


def _bias(key: str, bias: object) -> tuple[int, float]:
    path = f"logit_bias.{key[:64]}"
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
        raise InvalidRequest(
            f"`logit_bias` has the key {shown(key)}; keys are token ids written as decimal integers.", param=path
        )
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise InvalidRequest(f"`{path}` is {shown(bias)} and must be a number.", param=path, code="invalid_type")
    if not -100 <= bias <= 100:
        raise InvalidRequest(f"`{path}` is {shown(bias)}; send a number from -100 to 100.", param=path)
    return int(key), float(bias)


def _bad_id(value: list[Any], param: str, most: int) -> InvalidRequest:
    index, item = next((i, item) for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= most)
    path = f"{param}[{index}]"
    if type(item) is not int:
        return InvalidRequest(
            f"`{path}` is {shown(item)}; every token id must be an integer.", param=path, code="invalid_type"
        )
    return InvalidRequest(f"`{path}` is {item}, not a token of this model; use ids from 0 to {most}.", param=path)


def _nonempty_ids(value: Any, param: str, vocab_size: int | None) -> TokenIds:
    token_ids = parse_token_ids(value, param, vocab_size)
    if not token_ids:
        raise _empty(param)
    return token_ids


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(
            f"`{param}` is {shown(value)}; the prompts before it are strings, so send a string.",
            param=param,
            code="invalid_type",
        )
    if not value:
        raise _empty(param)
    return value


def _empty(param: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` is empty; send at least one character or token.", param=param)
