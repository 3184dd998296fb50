"""The largest entries of long rows, found in two stages: first which stretches of a row can hold them.

On a CPU this is several times faster than `max` and `topk` over a whole vocabulary, and gives the same values.
"""

from __future__ import annotations

import math
from math import gcd

import torch.nn.functional as F
from torch import Tensor

_STRETCH = 64
_LONG_STRETCH = 512  # finds one entry fastest


def most_likely(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row and its column: [rows] and int64[rows]. NaN counts as the largest."""
    length = max(_STRETCH, gcd(rows.shape[1], _LONG_STRETCH))  # filling rows up would copy them
    stretches = _stretches(rows, length)
    which = stretches.amax(-1).argmax(-1, keepdim=True)
    values, at = stretches.gather(1, which[..., None].expand(-1, -1, length)).squeeze(1).max(-1)
    return values, which.squeeze(1) * length + at


def likeliest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, largest first, and their columns: [rows, count] twice.

    Among equal entries the choice depends on the row and on `count` only.
    """
    stretches = _stretches(rows, _STRETCH)
    if count >= stretches.shape[1]:
        whole = rows.topk(count, dim=-1)
        return whole.values, whole.indices
    # each of the largest entries lies in one of the `count` stretches with the largest maxima
    which = stretches.amax(-1).topk(count, dim=-1).indices
    values, at = stretches.gather(1, which[..., None].expand(-1, -1, _STRETCH)).flatten(1).topk(count, dim=-1)
    return values, which.gather(1, at // _STRETCH) * _STRETCH + at % _STRETCH


def _stretches(rows: Tensor, length: int) -> Tensor:
    """[rows, columns] as [rows, stretches, length], filled up with -inf."""
    missing = -rows.shape[1] % length
    if missing:
        rows = F.pad(rows, (0, missing), value=-math.inf)
    return rows.reshape(rows.shape[0], -1, length)
