"""The buffer that KV events wait in; it loses the oldest when it is full."""

from __future__ import annotations

from collections import deque
from typing import Any

from tensorrt_llm._utils import KVCacheEventSerializer


class EventBuffer:
    """Envelopes of one attention-DP rank (None: attention DP is off), oldest first. Not thread-safe."""

    def __init__(self, size: int, window_size: int, rank: int | None, drop_every: int) -> None:
        self._waiting: deque[dict[str, Any]] = deque(maxlen=size)
        self._window_size = window_size
        self._rank = rank
        self._drop_every = drop_every
        self._next_id = 0

    def add(self, data: dict[str, Any]) -> None:
        """One removal directly after another one joins its event."""
        if data["type"] == "removed" and self._waiting and self._waiting[-1]["data"]["type"] == "removed":
            self._waiting[-1]["data"]["block_hashes"] += data["block_hashes"]
            return
        event_id = self._next_id
        self._next_id += 1
        if self._drop_every and event_id and event_id % self._drop_every == 0:
            return
        self._waiting.append(KVCacheEventSerializer.envelope(event_id, data, self._window_size, self._rank))

    def take(self) -> list[dict[str, Any]]:
        """All that wait; the buffer is empty afterwards."""
        events = list(self._waiting)
        self._waiting.clear()
        return events
