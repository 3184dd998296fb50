"""The simulated KV cache: paged blocks with an LRU prefix cache over chained block hashes.

A block is in one of three places, and the counts always add up to `num_blocks`: unused, held by sequences (references),
or evictable (full, nobody holds it, still reusable). A block that was never full is private to its sequence and becomes
unused at once when let go. A full block whose hash another block already carries keeps its place in the LRU order but
has no name: nobody will find it, and it leaves when its turn comes. (So the parent of a block that is stored now may be
stored no more: the sequence holds a nameless copy of it, and the one with the name was evicted.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from trtserve.plugins.api import BlockHash, KVEvent, KVRemoved, KVStored, StoredBlock, TokenIds


class Block:
    """Room for one block of tokens. Compared by identity."""

    __slots__ = ("hash", "is_full", "references")

    def __init__(self) -> None:
        self.hash: BlockHash | None = None  # set while the pool can find the block by it
        self.is_full = False
        self.references = 1  # sequences that hold it


class BlockPool:
    """All blocks of one worker. Changes to what is reusable are kept as events until `take_events`."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._unused = num_blocks
        self._stored: dict[BlockHash, Block] = {}
        self._evictable: OrderedDict[Block, None] = OrderedDict()  # least recently released first
        self._events: list[KVEvent] = []

    @property
    def num_unused(self) -> int:
        return self._unused

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return self._unused + len(self._evictable)

    @property
    def num_stored(self) -> int:
        """Blocks that `match` can find, held or not."""
        return len(self._stored)

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def match(self, hashes: Sequence[BlockHash], limit: int) -> list[Block]:
        """The stored blocks of the longest prefix of `hashes`, at most `limit`; takes no reference."""
        matched: list[Block] = []
        for block_hash in hashes[:limit]:
            block = self._stored.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def num_free_beside(self, matched: Sequence[Block]) -> int:
        """How many blocks `allocate` could give once `matched` are held."""
        return self.num_free - sum(not block.references for block in matched)

    def hold(self, matched: Sequence[Block]) -> None:
        """Take one reference to each."""
        for block in matched:
            if not block.references:
                del self._evictable[block]
            block.references += 1

    def allocate(self, count: int) -> list[Block]:
        """`count` private blocks, held by the caller; evicts where none are unused. count <= num_free."""
        assert count <= self.num_free, f"{count} blocks asked for and {self.num_free} free: the caller checks first"
        removed: list[BlockHash] = []
        for _ in range(count - self._unused):
            block, _ = self._evictable.popitem(last=False)
            self._unused += 1
            if block.hash is not None:
                del self._stored[block.hash]
                removed.append(block.hash)
        if removed:
            self._events.append(KVRemoved(tuple(removed)))
        self._unused -= count
        return [Block() for _ in range(count)]

    def store(
        self, blocks: Sequence[Block], hashes: Sequence[BlockHash], parent: BlockHash | None, token_ids: TokenIds
    ) -> None:
        """Held blocks that became full can be reused from now on.

        `blocks` follow one another in their sequence, after the block with hash `parent` (None: they begin it).
        token_ids: int32[len(blocks) * block_size].
        """
        fresh: list[StoredBlock] = []
        stored, size, start = self._stored, self.block_size, 0
        for block, block_hash in zip(blocks, hashes, strict=True):
            block.is_full = True
            if block_hash in stored:
                self._publish(parent, fresh)
                fresh, parent = [], block_hash
            else:
                block.hash = block_hash
                stored[block_hash] = block
                fresh.append(StoredBlock(block_hash, token_ids[start : start + size]))
            start += size
        self._publish(parent, fresh)

    def take_in(self, hashes: Sequence[BlockHash], token_ids: TokenIds) -> int:
        """Store the blocks of a prompt's beginning that another worker computed, as many as there is room for; held by
        nobody. hashes: from the first block on. token_ids: int32[at least len(hashes) * block_size].

        Returns how many of `hashes` are stored now.
        """
        here = self.match(hashes, len(hashes))
        self.hold(here)  # so that making room for the rest evicts none of them
        stop = len(here) + min(len(hashes) - len(here), self.num_free)
        blocks = self.allocate(stop - len(here))
        parent = hashes[len(here) - 1] if here else None
        block_tokens = token_ids[len(here) * self.block_size : stop * self.block_size]
        self.store(blocks, hashes[len(here) : stop], parent, block_tokens)
        self.release([*here, *blocks])
        return stop

    def release(self, blocks: Sequence[Block]) -> None:
        """Give back one reference to each block of a sequence, the last block first: suffixes are evicted first."""
        for block in reversed(blocks):
            block.references -= 1
            if block.references:
                continue
            if block.is_full:
                self._evictable[block] = None
            else:
                self._unused += 1

    def take_events(self) -> list[KVEvent]:
        """What was stored and removed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def _publish(self, parent: BlockHash | None, fresh: list[StoredBlock]) -> None:
        if fresh:
            self._events.append(KVStored(parent, tuple(fresh)))
