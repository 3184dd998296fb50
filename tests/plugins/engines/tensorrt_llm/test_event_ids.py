"""Numbers of KV events: a gap means that some were lost, and each attention-DP rank counts its own."""

from __future__ import annotations

from trtserve.plugins.engines.tensorrt_llm.events import EventTranslator
from trtserve.plugins.engines.tensorrt_llm.salts import Salts


def lost(*numbered: tuple[int, int | None]) -> int:
    """How many events are missed in a stream of (event id, rank)."""
    translator = EventTranslator(4, Salts(4), num_ranks=2)
    for event_id, rank in numbered:
        event = {"event_id": event_id, "data": {"type": "removed", "block_hashes": []}, "window_size": 128}
        translator.translate(event if rank is None else {**event, "attention_dp_rank": rank})
    return translator.num_lost


def test_a_gap_is_counted():
    assert lost((0, None), (1, None), (5, None), (6, None)) == 3


def test_ranks_count_apart():
    assert lost((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (3, 0), (2, 1)) == 0
    assert lost((0, 0), (7, 1), (1, 0), (9, 1)) == 1
