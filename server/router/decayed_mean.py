"""A mean that forgets: the one kind of average that the router learns with."""

from __future__ import annotations


class DecayedMean:
    """Exponentially weighted mean of samples, whose weight halves with every `half_life` samples that follow.

    It is the weighted sum divided by the sum of weights, so the first samples count in full and are not drawn to zero.
    `start` is what it says before any sample, and counts for as much as `start_weight` samples that came first.
    """

    __slots__ = ("_decay", "_sum", "_weight", "num_samples")

    def __init__(self, start: float, half_life: float, start_weight: float = 1.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life)
        self._sum = start * start_weight
        self._weight = start_weight
        self.num_samples = 0

    def add(self, value: float, count: int = 1) -> None:
        """`count` samples, at least one, whose mean is `value`; they age the older ones, not each other."""
        decay = self._decay if count == 1 else self._decay**count
        self._sum = self._sum * decay + value * count
        self._weight = self._weight * decay + count
        self.num_samples += count

    @property
    def value(self) -> float:
        return self._sum / self._weight
