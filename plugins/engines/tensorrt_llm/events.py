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
from itertools import islice
from typing import Any, TypeAlias

from trtserve.plugins.api import BlockHash, KVCleared, KVEvent, KVRemoved, KVStored, StoredBlock
from trtserve.plugins.blocks import block_hash, root_hash
from trtserve.plugins.engines.tensorrt_llm.salts import Salts

logger = logging.getLogger(__name__)

TheirHash: TypeAlias = int | str


class RankEvents:
    """The events of one rank's KV cache, in order.

    block_size: tokens in a full block.

    A gap in the numbers means that the event buffer overflowed. What is known is kept then: most of it is still stored,
    and `capacity` bounds the rest; a router that knew nothing would be blind until everything was stored anew.
    """

    def __init__(self, block_size: int, salts: Salts) -> None:
        self._block_size = block_size
        self._salts = salts
        self.capacity: int | None = None
        """As many blocks as may be told to be stored: those beyond must have been removed without our hearing of it,
        or are in host memory; the oldest are told to be removed then. None: any number."""
        self.num_gpu_blocks: int | None = None
        self.num_lost = 0  # events
        self._next_id: int | None = None
        self._window: int | None = None  # the widest: others are of layers that see less
        self._ours: OrderedDict[TheirHash, BlockHash] = OrderedDict()
        self._names: Counter[BlockHash] = Counter()  # how many of theirs are one of ours

    def __len__(self) -> int:
        return len(self._ours)

    def take(self, event: Mapping[str, Any]) -> list[KVEvent]:
        """Unknown kinds of events are skipped: later versions have more.

        Raises KeyError, TypeError and the like where a known kind has not its documented shape; it changes nothing
        then.
        """
        self._count(event["event_id"])
        data, window = event["data"], event.get("window_size")
        if window is not None and self._window is not None and window < self._window:
            return []
        events = self._widen(window)
        match data["type"]:
            case "created":
                self.num_gpu_blocks = data["num_blocks_per_cache_level"][0]
            case "stored":
                events += self._stored(data)
            case "removed":
                events += _removed(self._remove(data["block_hashes"]))
            case _:  # updated: a block in host memory can still be used
                pass
        return events

    def _count(self, event_id: int) -> None:
        if self._next_id is not None and event_id > self._next_id:
            if not self.num_lost:
                text = "KV events %d to %d were lost: raise kv_cache_config.event_buffer_max_size"
                logger.warning(text, self._next_id, event_id - 1)
            self.num_lost += event_id - self._next_id
        self._next_id = event_id + 1

    def _widen(self, window: int | None) -> list[KVEvent]:
        """What was taken for the full window before is none."""
        if window is None or window == self._window:
            return []
        has_blocks = bool(self._ours)
        self._window = window
        self._ours.clear()
        self._names.clear()
        return [KVCleared()] if has_blocks else []

    def _stored(self, data: Mapping[str, Any]) -> list[KVEvent]:
        """A chain of blocks; one that is not full, or has no known beginning, ends it."""
        parent = self._ours.get(data["parent_hash"]) if data["parent_hash"] is not None else None
        if parent is None and data["parent_hash"] is not None:
            return []  # where these blocks stand cannot be known
        if parent is not None:
            self._ours.move_to_end(data["parent_hash"])  # in use, so not the one that was removed unheard of
        blocks = data["blocks"] if self.capacity is None else data["blocks"][: self.capacity]
        chain = self._chain(parent, blocks)
        names = [block["block_hash"] for block in blocks[: len(chain)]]
        gone: list[BlockHash] = []
        for name, stored in zip(names, chain, strict=True):
            gone += self._remember(name, stored.hash)
        # Removed before stored, so that nobody who follows ever counts more than there can be.
        gone += self._forget_beyond_capacity()
        return _removed(gone) + ([KVStored(parent, tuple(chain))] if chain else [])

    def _chain(self, parent: BlockHash | None, blocks: Sequence[Mapping[str, Any]]) -> list[StoredBlock]:
        chain: list[StoredBlock] = []
        for block in blocks:
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
        return chain

    def _remember(self, theirs: TheirHash, ours: BlockHash) -> list[BlockHash]:
        """What it was the last name of, where it is another block's now."""
        former = self._ours.pop(theirs, None)
        self._ours[theirs] = ours
        if former == ours:
            return []
        self._names[ours] += 1
        return [] if former is None or not self._unname(former) else [former]

    def _unname(self, ours: BlockHash) -> bool:
        """Whether that was its last name."""
        self._names[ours] -= 1
        if self._names[ours]:
            return False
        del self._names[ours]
        return True

    def _remove(self, names: Iterable[TheirHash]) -> list[BlockHash]:
        """A name that is not known is a partial block's, or that of one that was never placed."""
        popped = [self._ours.pop(theirs, None) for theirs in names]
        return [ours for ours in popped if ours is not None and self._unname(ours)]

    def _forget_beyond_capacity(self) -> list[BlockHash]:
        surplus = 0 if self.capacity is None else len(self._ours) - self.capacity
        return self._remove(list(islice(self._ours, surplus))) if surplus > 0 else []


def _removed(hashes: Sequence[BlockHash]) -> list[KVEvent]:
    return [KVRemoved(tuple(hashes))] if hashes else []


class EventTranslator:
    """For the one reader of an executor's events. num_ranks: attention-DP ranks, each of which numbers its own."""

    def __init__(self, block_size: int, salts: Salts, num_ranks: int = 1) -> None:
        self._ranks = tuple(RankEvents(block_size, salts) for _ in range(num_ranks))

    @property
    def num_blocks(self) -> int | None:
        """In a rank's GPU memory, once `created` has told it."""
        return self._ranks[0].num_gpu_blocks

    @property
    def num_lost(self) -> int:
        """Events of all ranks that never came."""
        return sum(rank.num_lost for rank in self._ranks)

    def bound(self, num_blocks: int) -> None:
        """Never tell of more blocks of a rank than this."""
        for rank in self._ranks:
            rank.capacity = num_blocks

    def translate(self, event: Mapping[str, Any]) -> tuple[int, Sequence[KVEvent]]:
        """(attention-DP rank, what happened there). Raises as `RankEvents.take`, and ValueError for a rank that is not
        there."""
        rank = int(event.get("attention_dp_rank") or 0)
        if not 0 <= rank < len(self._ranks):
            raise ValueError(f"a KV event of rank {rank}, of {len(self._ranks)}")
        return rank, self._ranks[rank].take(event)
