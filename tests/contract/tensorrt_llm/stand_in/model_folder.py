"""What the stand-in needs from a model's folder: its vocabulary's size, its context, its special tokens. No weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelFolder:
    vocab_size: int
    max_seq_len: int
    end_ids: frozenset[int]
    special_ids: frozenset[int]  # never generated unless biased towards; `end_ids` among them

    @classmethod
    def read(cls, folder: Path) -> ModelFolder:
        """Raises ValueError where there is no config.json with a vocabulary."""
        config = _json(folder / "config.json")
        config = {**config, **config.get("text_config", {})}
        if "vocab_size" not in config:
            raise ValueError(f"{folder} holds no config.json with a vocab_size; the stand-in loads local folders only")
        generation = _json(folder / "generation_config.json")
        ends = _ids(generation.get("eos_token_id")) | _ids(config.get("eos_token_id"))
        others = _ids(config.get("bos_token_id")) | _ids(config.get("pad_token_id"))
        added = _json(folder / "tokenizer.json").get("added_tokens", [])
        special = {token["id"] for token in added if token.get("special")}
        length = int(config.get("max_position_embeddings", 8192))
        return cls(int(config["vocab_size"]), length, frozenset(ends), frozenset(ends | others | special))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
