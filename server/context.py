"""How long prompts and sequences may be, from what the ready workers take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtserve.plugins.api import EngineInfo, Role


@dataclass(frozen=True, slots=True)
class ContextLimits:
    """Tokens that every worker takes on which a request may come to lie."""

    max_seq_len: int  # prompt and output
    max_prompt_tokens: int


def context_limits(workers: Iterable[tuple[Role, EngineInfo]]) -> ContextLimits | None:
    """None without workers. A prefill worker holds a prompt and one token, so its longest sequence bounds prompts only;
    a decode worker's own bound of prompts counts only where a hand-over has failed, and for that one request."""
    known = list(workers)
    whole = [info.max_seq_len for role, info in known if role is not Role.PREFILL]
    longest = min(whole or [info.max_seq_len for _, info in known], default=None)
    if longest is None:
        return None
    prompts = [longest_prompt(info) for role, info in known if role is not Role.DECODE]
    return ContextLimits(longest, min([longest - 1, *prompts]))


def longest_prompt(info: EngineInfo) -> int:
    """Tokens of the longest prompt that an engine computes."""
    longest = info.max_seq_len - 1
    return longest if info.max_prompt_tokens is None else min(longest, info.max_prompt_tokens)
