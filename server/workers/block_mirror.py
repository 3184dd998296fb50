"""What an engine has stored, as its own KV events tell it, so that no engine has to answer for the whole set."""

from __future__ import annotations

from collections.abc import Sequence

from trtserve.plugins.api import BlockHash, KVCleared, KVEvent, KVRemoved, KVStored
from trtserve.server.workers import wire


class BlockMirror:
    """The hashes of the blocks that are stored, and the number of the next event. Needs a lock around it.

    Removing what is not there and storing what is there change nothing, as in the server's index, so that both agree
    whatever an engine says.
    """

    def __init__(self) -> None:
        self.next_event = 0  # every event of the incarnation has a number, the first one 0
        # A dictionary for its order: packing a million hashes in the order in which they were made takes a quarter of
        # the time that a set's order takes.
        self._hashes: dict[BlockHash, None] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def apply(self, events: Sequence[KVEvent]) -> int:
        """Follow these events; returns the number of the first."""
        first_event = self.next_event
        for event in events:
            match event:
                case KVStored():
                    self._hashes.update((block.hash, None) for block in event.blocks)
                case KVRemoved():
                    for block_hash in event.hashes:
                        self._hashes.pop(block_hash, None)
                case KVCleared():
                    self._hashes.clear()
        self.next_event += len(events)
        return first_event

    def snapshot(self, rank: int = 0) -> wire.Blocks:
        """Everything stored after all events so far, as a message. Takes about 40 ms for a million blocks."""
        return wire.blocks_of(self.next_event, self._hashes, rank)
