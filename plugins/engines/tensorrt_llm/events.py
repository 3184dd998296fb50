"""TensorRT-LLM's KV cache events, as ours.

Its block hashes are internal to it and differ between versions, so they are taken as opaque names: the index is keyed
by our own chained hash of the tokens that a stored block carries, and a map from their names to ours is kept for
`removed`. Shapes: `KVCacheEventSerializer` of TensorRT-LLM.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from trtserve.plugins.api import BlockHash, KVEvent, KVRemoved, KVStored, StoredBlock
from trtserve.plugins.blocks import block_hash, root_hash
from trtserve.plugins.engines.tensorrt_llm.salts import Salts

logger = logging.getLogger(__name__)

TheirHash: TypeAlias = int | str


class RankEvents:
    """The events of one rank's KV cache, in order.

    block_size: tokens in a full block.
    """

    def __init__(self, block_size: int, salts: Salts) -> None:
        self._block_size = block_size
        self.capacity: int | None = None
        """Blocks that the cache holds, host memory included; what is known beyond that must have been removed without
        our hearing of it, the oldest first. None: not known."""
        self._salts = salts
        self._ours: OrderedDict[TheirHash, BlockHash] = OrderedDict()
        self._names: Counter[BlockHash] = Counter()  # how many of theirs are one of ours
        self.num_orphans = 0  # blocks whose parent is not known: they cannot be placed

    def __len__(self) -> int:
        return len(self._ours)

    def stored(self, data: Mapping[str, Any]) -> list[KVEvent]:
        """A chain of blocks; one that is not full, or has no known beginning, ends it."""
        parent = self._ours.get(data["parent_hash"]) if data["parent_hash"] is not None else None
        if parent is None and data["parent_hash"] is not None:
            self.num_orphans += len(data["blocks"])
            return []
        chain: list[StoredBlock] = []
        for block in data["blocks"]:
            tokens = array("i", [token["token_id"] for token in block["tokens"]])
            if len(tokens) != self._block_size:
                break
            before = chain[-1].hash if chain else parent
            if before is None:
                salt = self._salts.of(tokens, block)
                if salt is None:
                    break
                before = root_hash(salt)
            chain.append(StoredBlock(block_hash(before, tokens), tokens))
            self._remember(block["block_hash"], chain[-1].hash)
        events: list[KVEvent] = [KVStored(parent, tuple(chain))] if chain else []
        return events + self._forget_beyond_capacity()

    def removed(self, data: Mapping[str, Any]) -> list[KVEvent]:
        return self._remove(data["block_hashes"])

    def _remember(self, theirs: TheirHash, ours: BlockHash) -> None:
        former = self._ours.pop(theirs, None)
        self._ours[theirs] = ours
        if former != ours:
            self._names[ours] += 1
            if former is not None:
                self._names[former] -= 1

    def _remove(self, names: Iterable[TheirHash]) -> list[KVEvent]:
        gone = []
        for theirs in names:
            ours = self._ours.pop(theirs, None)
            if ours is None:
                continue  # a partial block, or one that was never placed
            self._names[ours] -= 1
            if not self._names[ours]:
                del self._names[ours]
                gone.append(ours)
        return [KVRemoved(tuple(gone))] if gone else []

    def _forget_beyond_capacity(self) -> list[KVEvent]:
        surplus = 0 if self.capacity is None else len(self._ours) - self.capacity
        return self._remove(list(self._ours)[:surplus]) if surplus > 0 else []


class EventTranslator:
    """For the one reader of an executor's events.

    A gap in the numbers means that the event buffer overflowed. What is known is kept then: most of it is still stored,
    and `RankEvents` bounds the rest; a router that knew nothing would be blind until everything was stored anew.
    """

    def __init__(self, block_size: int, salts: Salts) -> None:
        self._block_size = block_size
        self._salts = salts
        self._ranks: dict[int, RankEvents] = {}
        self._next_ids: dict[int, int] = {}  # each rank counts its own events
        self._window: int | None = None  # the widest: others are of layers that see less
        self.num_lost = 0
        self.num_blocks: int | None = None  # in a rank's GPU memory, once `created` has told it

    def translate(self, event: Mapping[str, Any]) -> tuple[int, Sequence[KVEvent]]:
        """(attention-DP rank, what happened there). Unknown kinds of events are skipped: later versions have more.

        Raises KeyError or TypeError where a known kind has not its documented shape.
        """
        rank, data = int(event.get("attention_dp_rank") or 0), event["data"]
        self._count(event["event_id"], rank)
        if not self._is_full_window(event.get("window_size")):
            return rank, ()
        blocks = self._ranks.get(rank)
        if blocks is None:
            blocks = self._ranks[rank] = RankEvents(self._block_size, self._salts)
        match data["type"]:
            case "created":
                blocks.capacity = sum(data["num_blocks_per_cache_level"])
                self.num_blocks = data["num_blocks_per_cache_level"][0]
                return rank, ()
            case "stored":
                return rank, blocks.stored(data)
            case "removed":
                return rank, blocks.removed(data)
            case _:  # updated: a block in host memory can still be used
                return rank, ()

    def _count(self, event_id: int, rank: int) -> None:
        expected = self._next_ids.get(rank, event_id)
        if event_id > expected:
            if not self.num_lost:
                logger.warning(
                    "KV events %d to %d were lost: raise kv_cache_config.event_buffer_max_size",
                    expected,
                    event_id - 1,
                )
            self.num_lost += event_id - expected
        self._next_ids[rank] = event_id + 1

    def _is_full_window(self, window: int | None) -> bool:
        if window is None:
            return True
        self._window = max(window, self._window or 0)
        return window == self._window
