"""A small KV block pool with a prefix tree and LRU: what is cached, what is reused, which events say so.

A block's key is the tokens before it and its own. The last token of a sequence has no KV and belongs to no key. After
the prefill the full blocks of a prompt are stored, at the end of a sequence all of its blocks, the last of them perhaps
partial. A longer block takes the place of a partial one that it begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

from tensorrt_llm._utils import Hash, KVCacheEventSerializer

from .kv_events import EventBuffer

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    tokens: Tokens
    hash: Hash | None
    parent: Node | None
    depth: int = 0
    children: dict[Tokens, Node] = field(default_factory=dict)
    last_use: int = 0
    level: int = 0  # 1: in host memory


class BlockPool:
    """Not thread-safe: the engine's thread owns it."""

    def __init__(
        self, num_blocks: int, host_blocks: int, block_size: int, reuse: bool, partial_reuse: bool,
        hex_hashes: bool, events: EventBuffer | None,
    ) -> None:  # fmt: skip
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reused_blocks = 0
        self.missed_blocks = 0
        self._host_blocks = host_blocks
        self._reuse = reuse
        self._partial_reuse = partial_reuse
        self._hex_hashes = hex_hashes
        self._events = events
        self._roots: dict[str | None, Node] = {}
        self._reserved = 0
        self._clock = 0
        self._at_level = [0, 0]  # blocks in the tree, on the GPU and in host memory
        self._emit(KVCacheEventSerializer.created([num_blocks, host_blocks]))

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold; what is merely cached counts as free."""
        return self._reserved

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def has_room(self, blocks: int) -> bool:
        return self._reserved + blocks <= self.num_blocks

    def reserve(self, blocks: int) -> None:
        """Take blocks, which must be there, for a sequence's whole life; cached ones go for them."""
        self._reserved += blocks
        self._evict()

    def release(self, blocks: int) -> None:
        self._reserved -= blocks

    def cached_tokens(self, prompt: list[int], salt: str | None) -> int:
        """How many tokens of the prompt have KV here: whole blocks and the best beginning of one more."""
        if not self._reuse:
            return 0
        self._clock += 1
        node, rest = self._root(salt), tuple(prompt[:-1])
        cached = 0
        while len(rest) >= self.block_size and (child := node.children.get(rest[: self.block_size])) is not None:
            self._touch(child)
            node, rest, cached = child, rest[self.block_size :], cached + self.block_size
        self.reused_blocks += cached // self.block_size
        self.missed_blocks += self.blocks_for(len(rest))
        return cached + (self._partial_match(node, rest) if self._partial_reuse else 0)

    def store(self, token_ids: list[int], salt: str | None, partial: bool) -> None:
        """Put a sequence's blocks into the tree. The last token is left out."""
        if not self._reuse:
            return
        self._clock += 1
        node, new = self._root(salt), []
        parent = node
        for tokens in self._chopped(tuple(token_ids[:-1]), partial):
            child = node.children.get(tokens)
            if child is None:
                if not new:
                    parent = node
                self._displace_partial(node, tokens)
                child = node.children[tokens] = Node(tokens, self._hash(node, tokens, salt), node, node.depth + 1)
                self._at_level[0] += 1
                new.append((child.hash, tokens))
            self._touch(child)
            node = child
        if new:
            self._emit(KVCacheEventSerializer.stored(parent.hash, new))
        self._evict()

    def _chopped(self, tokens: Tokens, partial: bool) -> Iterator[Tokens]:
        for start in range(0, len(tokens), self.block_size):
            block = tokens[start : start + self.block_size]
            if partial or len(block) == self.block_size:
                yield block

    def _root(self, salt: str | None) -> Node:
        return self._roots.setdefault(salt, Node((), None, None))

    def _hash(self, parent: Node, tokens: Tokens, salt: str | None) -> Hash:
        text = repr((parent.hash if parent.parent else salt, tokens)).encode()
        value = blake2b(text, digest_size=8)
        return value.hexdigest() if self._hex_hashes else int.from_bytes(value.digest(), "little")

    def _partial_match(self, node: Node, rest: Tokens) -> int:
        best = 0
        for tokens, child in node.children.items():
            common = next((i for i, pair in enumerate(zip(tokens, rest, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(tokens), len(rest)) if common is None else common
            if common > best:
                best = common
                self._touch(child)
        return best

    def _displace_partial(self, node: Node, tokens: Tokens) -> None:
        for partial in [key for key in node.children if len(key) < len(tokens) and tokens[: len(key)] == key]:
            self._remove(node.children[partial])

    def _touch(self, node: Node) -> None:
        node.last_use = self._clock
        if node.level:
            self._move(node, 0)

    def _move(self, node: Node, level: int) -> None:
        assert node.hash is not None
        self._emit(KVCacheEventSerializer.moved(node.hash, node.level, level))
        self._at_level[node.level] -= 1
        self._at_level[level] += 1
        node.level = level

    def _remove(self, node: Node) -> None:
        assert node.parent is not None and node.hash is not None
        for child in list(node.children.values()):
            self._remove(child)
        del node.parent.children[node.tokens]
        self._at_level[node.level] -= 1
        self._emit(KVCacheEventSerializer.removed(node.hash))

    def _evict(self) -> None:
        """What is cached has the blocks that running sequences leave. The least recently used go first, of those the
        deepest: to the host where it has room, away otherwise."""
        self._shrink(0, max(0, self.num_blocks - self._reserved))
        self._shrink(1, self._host_blocks)

    def _shrink(self, level: int, room: int) -> None:
        if self._at_level[level] <= room:
            return
        nodes = sorted((node for node in self._nodes() if node.level == level), key=lambda n: (n.last_use, -n.depth))
        for node in nodes:
            if self._at_level[level] <= room:
                return
            if level == 0 and self._host_blocks:
                self._move(node, 1)
            elif node.parent is not None and node.parent.children.get(node.tokens) is node:
                self._remove(node)

    def _nodes(self) -> Iterator[Node]:
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _emit(self, data: dict[str, object]) -> None:
        if self._events is not None:
            self._events.add(data)
