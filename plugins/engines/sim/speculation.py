"""Simulated speculative decoding (multi-token prediction): how many drafted tokens a decode step keeps.

Each of `num_draft_tokens` drafts is right with probability `acceptance_rate`, and the first wrong one ends the run, so
j drafts or more are kept with probability rate^j. The draw comes from the sequence's own tokens: the same sequence
takes the same steps on every worker, and its tokens are the ones it would say without speculation.
"""

from __future__ import annotations

_DRAWS = 1 << 16


class Speculation:
    """The draft model of one engine; has no state."""

    def __init__(self, num_draft_tokens: int, acceptance_rate: float) -> None:
        self._thresholds = [acceptance_rate**kept * _DRAWS for kept in range(1, num_draft_tokens + 1)]

    def draft(self, draw: int, limit: int) -> tuple[int, int]:
        """(tokens drafted, tokens kept) in one step; at most `limit` are drafted. draw: 16 random bits."""
        drafted = min(len(self._thresholds), limit)
        accepted = 0
        while accepted < drafted and draw < self._thresholds[accepted]:
            accepted += 1
        return drafted, accepted
