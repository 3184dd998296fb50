"""`tensorrt_llm._utils`: of it only the class whose dicts are the KV events."""

from __future__ import annotations

from typing import Any

Hash = int | str


class KVCacheEventSerializer:
    @staticmethod
    def envelope(event_id: int, data: dict[str, Any], window_size: int, rank: int | None) -> dict[str, Any]:
        """`rank` is None where attention DP is off."""
        event = {"event_id": event_id, "data": data, "window_size": window_size}
        return event if rank is None else {**event, "attention_dp_rank": rank}

    @staticmethod
    def created(num_blocks_per_cache_level: list[int]) -> dict[str, Any]:
        return {"type": "created", "num_blocks_per_cache_level": num_blocks_per_cache_level}

    @staticmethod
    def stored(parent: Hash | None, blocks: list[tuple[Hash, tuple[int, ...]]]) -> dict[str, Any]:
        stored_block = KVCacheEventSerializer._stored_block
        return {"type": "stored", "parent_hash": parent, "blocks": [stored_block(*block) for block in blocks]}

    @staticmethod
    def removed(block_hash: Hash) -> dict[str, Any]:
        return {"type": "removed", "block_hashes": [block_hash]}

    @staticmethod
    def moved(block_hash: Hash, old_level: int, new_level: int) -> dict[str, Any]:
        difference = {"type": "event_diff", "new_value": new_level, "old_value": old_level}
        return {"type": "updated", "block_hash": block_hash, "cache_level": difference, "priority": None}

    @staticmethod
    def _stored_block(block_hash: Hash, token_ids: tuple[int, ...]) -> dict[str, Any]:
        tokens = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in token_ids]
        return {"type": "stored_block", "block_hash": block_hash, "tokens": tokens, "cache_level": 0, "priority": 35}
