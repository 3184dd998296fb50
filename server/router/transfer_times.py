"""How long moving KV takes, learnt from the moves that decode workers report."""

from __future__ import annotations

from trtserve.server.router.decayed_mean import DecayedMean

_LATENCY_MS = 2.0
"""Of the messages around a move, on one node."""

_START_MS_PER_BYTE = 1e-6  # 1 GB/s: TCP on one node
_SMALLEST_BYTES = 2**20  # a smaller move tells of latency, not of bandwidth
_HALF_LIFE = 50.0  # moves


class TransferTimes:
    """transfer_ms = latency + bytes / bandwidth, of all pairs of workers together."""

    def __init__(self) -> None:
        self._ms_per_byte = DecayedMean(_START_MS_PER_BYTE, _HALF_LIFE)
        self.bytes_per_token = 0.0

    def observe(self, num_bytes: int, duration_s: float) -> None:
        """A move that went well."""
        if num_bytes >= _SMALLEST_BYTES and duration_s > 0:
            self._ms_per_byte.add(duration_s * 1000 / num_bytes)

    def transfer_ms(self, num_tokens: int) -> float:
        return _LATENCY_MS + num_tokens * self.bytes_per_token * self._ms_per_byte.value
