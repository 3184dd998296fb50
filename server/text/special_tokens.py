"""The special tokens that tokenizer_config.json gives names to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def special_tokens(tokenizer_config: Mapping[str, Any]) -> Mapping[str, str]:
    """name -> token, for those that are set; a token is a string or an object with ``content``."""
    named = {}
    for name in _NAMES:
        token = tokenizer_config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            named[name] = token
    return named
