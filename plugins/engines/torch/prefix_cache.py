"""Finding KV blocks again by the tokens they were computed from.

The key is the chained block hash that the whole deployment shares (`trtserve.plugins.blocks`). It isn't collision
resistant, so a hit also needs equal tokens in the block and an equal digest of everything before it: a forged
collision is a miss.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

from trtserve.plugins.api import BlockHash, KVEvent, KVRemoved, KVStored, StoredBlock, TokenIds
from trtserve.plugins.blocks import block_hash, root_hash
from trtserve.plugins.engines.torch.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class Link:
    """What identifies one full block: its public hash, and a strong digest of its tokens and all before them."""

    hash: BlockHash
    digest: bytes
    token_bytes: bytes


class BlockChain:
    """The links of one sequence's full blocks, hashed once each as the sequence grows."""

    def __init__(
        self, block_size: int, cache_salt: str = "", hash_block: Callable[[BlockHash, TokenIds], BlockHash] = block_hash
    ) -> None:
        self._block_size = block_size
        self._hash_block = hash_block
        self._root = root_hash(cache_salt)
        self._root_digest = blake2b(cache_salt.encode(), digest_size=16).digest()
        self._links: list[Link] = []

    def links(self, tokens: TokenIds, count: int) -> list[Link]:
        """The first `count` links of a sequence that began as the one of the last call did."""
        while len(self._links) < count:
            start = len(self._links) * self._block_size
            block = tokens[start : start + self._block_size]
            raw = block.tobytes()
            parent = self._links[-1] if self._links else None
            digest = blake2b((parent.digest if parent else self._root_digest) + raw, digest_size=16).digest()
            self._links.append(Link(self._hash_block(parent.hash if parent else self._root, block), digest, raw))
        return self._links[:count]


class PrefixCache:
    """Which block holds the KV of which prefix. Owns the pool, and the KV events that nobody has fetched yet."""

    def __init__(self, num_blocks: int, block_size: int, enabled: bool = True) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self._evicted)
        self.enabled = enabled
        self._blocks: dict[BlockHash, int] = {}
        self._links: dict[int, Link] = {}
        self._events: list[KVEvent] = []

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def take_events(self) -> list[KVEvent]:
        """The events since the last call, in order; the caller owns the list."""
        events, self._events = self._events, []
        return events

    def lookup(self, chain: BlockChain, tokens: TokenIds, max_tokens: int) -> list[int]:
        """The blocks of the longest stored prefix of at most `max_tokens` tokens. Takes no hold on them."""
        found: list[int] = []
        if not self.enabled:
            return found
        for link in chain.links(tokens, max_tokens // self.block_size):
            block_id = self._blocks.get(link.hash)
            if block_id is None or not self._is_same(self._links[block_id], link):
                break
            found.append(block_id)
        return found

    def commit(self, chain: BlockChain, tokens: TokenIds, block_ids: list[int], start: int, stop: int) -> None:
        """Offer blocks `start` to `stop` of a sequence, which are held and full. Those already stored are left out."""
        if not self.enabled or start >= stop:
            return
        links = chain.links(tokens, stop)
        fresh: list[Link] = []
        for index in range(start, stop):
            link = links[index]
            if link.hash in self._blocks:
                self._announce(links, index, fresh)
                fresh = []
                continue
            self._blocks[link.hash] = block_ids[index]
            self._links[block_ids[index]] = link
            self.pool.mark_valid(block_ids[index])
            fresh.append(link)
        self._announce(links, stop, fresh)

    def discard(self, block_ids: list[int]) -> list[int]:
        """Forget those of a sequence's held blocks that nobody else holds; returns them. For contents gone bad."""
        own = [block_id for block_id in block_ids if self.pool.holders(block_id) == 1]
        for block_id in own:
            if block_id in self._links:
                self.pool.mark_worthless(block_id)
                self._evicted(block_id)
        return own

    @staticmethod
    def _is_same(stored: Link, wanted: Link) -> bool:
        return stored.token_bytes == wanted.token_bytes and stored.digest == wanted.digest

    def _announce(self, links: list[Link], stop: int, fresh: list[Link]) -> None:
        """Tell that the blocks just before index `stop` are stored."""
        if not fresh:
            return
        first = stop - len(fresh)
        parent = links[first - 1].hash if first else None
        blocks = tuple(StoredBlock(link.hash, array("i", link.token_bytes)) for link in fresh)
        self._events.append(KVStored(parent, blocks))

    def _evicted(self, block_id: int) -> None:
        link = self._links.pop(block_id)
        del self._blocks[link.hash]
        last = self._events[-1] if self._events else None
        if isinstance(last, KVRemoved):
            self._events[-1] = KVRemoved((*last.hashes, link.hash))
        else:
            self._events.append(KVRemoved((link.hash,)))
