"""What layers ask of attention, and the softmax of those that ask for more than torch's kernels know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionTerms(NamedTuple):
    """What a layer asks for beyond q, k and v. `sinks`: a logit for each query head, or None."""

    scaling: float
    window: int | None  # keys that a query sees, itself included; None: all
    softcap: float | None
    sinks: Tensor | None


def split_joined(joined: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """joined: [tokens, heads + 2 * kv_heads, dim] -> query [heads, tokens, dim], key and value [kv_heads, tokens, dim].

    Views.
    """
    by_head = joined.transpose(0, 1)
    first_value = (len(by_head) + heads) // 2
    return by_head[:heads], by_head[heads:first_value], by_head[first_value:]


def softmax(scores: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention weights of scores [..., queries, keys] in their dtype. Consumes `scores`."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.add_(mask)
    if sinks is None:
        return torch.softmax(scores, -1)
    # the sink takes part in the denominator and then carries no value
    with_sink = torch.cat([scores, sinks.to(scores.dtype)], -1)
    return torch.softmax(with_sink, -1, dtype=torch.float32)[..., :-1].to(scores.dtype)
