"""KV event dicts as `KVCacheEventSerializer` makes them, in a buffer that loses the oldest when it is full."""

from __future__ import annotations

from collections import deque
from typing import Any

Hash = int | str


def created(num_blocks_per_cache_level: list[int]) -> dict[str, Any]:
    return {"type": "created", "num_blocks_per_cache_level": num_blocks_per_cache_level}


def stored(parent: Hash | None, blocks: list[tuple[Hash, tuple[int, ...]]]) -> dict[str, Any]:
    return {"type": "stored", "parent_hash": parent, "blocks": [_stored_block(*block) for block in blocks]}


def removed(block_hash: Hash) -> dict[str, Any]:
    return {"type": "removed", "block_hashes": [block_hash]}


def moved(block_hash: Hash, old_level: int, new_level: int) -> dict[str, Any]:
    difference = {"type": "event_diff", "new_value": new_level, "old_value": old_level}
    return {"type": "updated", "block_hash": block_hash, "cache_level": difference, "priority": None}


def _stored_block(block_hash: Hash, token_ids: tuple[int, ...]) -> dict[str, Any]:
    tokens = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in token_ids]
    return {"type": "stored_block", "block_hash": block_hash, "tokens": tokens, "cache_level": 0, "priority": 35}


class EventBuffer:
    """Envelopes of one attention-DP rank (None: attention DP is off), oldest first. Not thread-safe."""

    def __init__(self, size: int, window_size: int, rank: int | None, drop_every: int) -> None:
        self._waiting: deque[dict[str, Any]] = deque(maxlen=size)
        self._window_size = window_size
        self._rank = rank
        self._drop_every = drop_every
        self._next_id = 0

    def add(self, data: dict[str, Any]) -> None:
        event_id = self._next_id
        self._next_id += 1
        if self._drop_every and event_id and event_id % self._drop_every == 0:
            return
        envelope = {"event_id": event_id, "data": data, "window_size": self._window_size}
        if self._rank is not None:
            envelope["attention_dp_rank"] = self._rank
        self._waiting.append(envelope)

    def take(self) -> list[dict[str, Any]]:
        """All that wait; the buffer is empty afterwards."""
        events = list(self._waiting)
        self._waiting.clear()
        return events
