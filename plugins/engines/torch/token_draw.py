"""Drawing tokens from probabilities: temperature, min_p, top_k, top_p and a reproducible source of chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trtserve.plugins.engines.torch.likeliest import likeliest

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_STRETCH = 256  # columns that are summed up before one of them is looked for
_STAGES = (64, 1024)  # how many of the likeliest tokens are ranked before the whole vocabulary is


@dataclass(frozen=True, slots=True)
class Draw:
    """How to draw one token. `chance`: where in [0, 1) of the remaining probability the token lies."""

    temperature: float  # > 0
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    chance: float

    @property
    def needs_order(self) -> bool:
        """Whether tokens have to be ranked."""
        return self.top_k > 0 or self.top_p < 1


def uniform(key: int, position: int) -> float:
    """A number in [0, 1) from a 64-bit key and a position (SplitMix64: Steele, Lea and Flood, 2014, section 4)."""
    mixed = _mix((_mix(key) + position * _GOLDEN_GAMMA) & _MASK_64)
    return float(mixed >> 11) * 2.0**-53


def draw_tokens(logits: Tensor, draws: Sequence[Draw], stages: tuple[int, ...] = _STAGES) -> list[int]:
    """logits: float32[len(draws), vocab], overwritten -> a token id each. Rows don't influence one another.

    `stages` changes speed, and the order of tokens that are equally likely.
    """
    weights = _weights(logits, draws)
    tokens: dict[int, int] = {}
    unordered = [index for index, draw in enumerate(draws) if not draw.needs_order]
    if unordered:
        drawn_at_once = _draw_unranked(weights[unordered], [draws[index] for index in unordered])
        tokens.update(zip(unordered, drawn_at_once, strict=True))
    vocab_size = logits.shape[-1]
    for count in (*(stage for stage in stages if stage < vocab_size), vocab_size):
        # in which stage a row ends follows from the row alone, so that equal weights keep their order in any company
        left = [index for index in range(len(draws)) if index not in tokens]
        now = [index for index in left if draws[index].top_k <= count or count == vocab_size]
        if now:
            drawn = _draw_ranked(weights[now], [draws[index] for index in now], count)
            tokens.update((index, token) for index, token in zip(now, drawn, strict=True) if token is not None)
    return [tokens[index] for index in range(len(draws))]


def _weights(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Probabilities at each row's temperature, with those below min_p set to zero: float32[rows, vocab]."""
    temperature = torch.tensor([draw.temperature for draw in draws], device=logits.device)
    # the largest becomes 0 first: a tiny temperature then gives -inf to the others and never inf - inf
    logits -= logits.amax(-1, keepdim=True)
    logits /= temperature.clamp_min(1e-30)[:, None]
    weights = torch.softmax(logits, -1)
    if any(draw.min_p > 0 for draw in draws):
        min_p = torch.tensor([draw.min_p for draw in draws], device=logits.device)
        weights.masked_fill_(weights < min_p[:, None] * weights.amax(-1, keepdim=True), 0.0)
    return weights


def _draw_unranked(weights: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw from all of each row: first which stretch of the vocabulary, then which token in it."""
    missing = -weights.shape[1] % _STRETCH
    stretches = F.pad(weights, (0, missing)).view(weights.shape[0], -1, _STRETCH)
    masses = stretches.sum(-1, dtype=torch.float64).cumsum(-1)
    chance = torch.tensor([[draw.chance] for draw in draws], dtype=torch.float64, device=weights.device)
    wanted = chance * masses[:, -1:]
    which = _column(masses, wanted)
    before = F.pad(masses, (1, 0)).gather(1, which)
    inside = stretches.gather(1, which[..., None].expand(-1, -1, _STRETCH)).squeeze(1)
    reached = inside.cumsum(-1, dtype=torch.float64)
    # two roundings of one sum may differ in the last bit: stay below what this stretch has
    last = torch.nextafter(reached[:, -1:], torch.zeros_like(before))
    tokens: list[int] = (which * _STRETCH + _column(reached, torch.minimum(wanted - before, last))).squeeze(1).tolist()
    return [min(token, weights.shape[1] - 1) for token in tokens]


def _draw_ranked(weights: Tensor, draws: Sequence[Draw], count: int) -> list[int | None]:
    """Draw among the `count` likeliest tokens of each row; None where top_p reaches beyond them."""
    vocab_size = weights.shape[-1]
    values, ids = likeliest(weights, count)
    limits = torch.tensor([draw.top_k or vocab_size for draw in draws], device=weights.device)
    ranks = torch.arange(count, device=weights.device)
    mass = values.double().masked_fill(ranks[None] >= limits[:, None], 0.0)
    # top_p is a share of what min_p and top_k have left over
    totals = torch.where(limits <= count, mass.sum(-1), weights.sum(-1, dtype=torch.float64))
    wanted = totals * torch.tensor([draw.top_p for draw in draws], dtype=torch.float64, device=weights.device)
    reached = mass.cumsum(-1)
    is_short = (limits > count) & (reached[:, -1] < wanted)
    # a token stays while those before it have not reached top_p, so the first always does
    kept = mass.masked_fill(reached - mass >= wanted[:, None], 0.0).cumsum(-1)
    chance = torch.tensor([[draw.chance] for draw in draws], dtype=torch.float64, device=weights.device)
    tokens = ids.gather(1, _column(kept, chance * kept[:, -1:])).squeeze(1).tolist()
    return [None if short else token for token, short in zip(tokens, is_short.tolist(), strict=True)]


def _column(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """The first column of each row that passes `wanted`: int64[rows, 1]. One of zero weight never does."""
    found = torch.searchsorted(cumulative, wanted, right=True)
    return found.clamp_max(cumulative.shape[-1] - 1)  # rows with NaN find no column


def _mix(value: int) -> int:
    value = (value + _GOLDEN_GAMMA) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
