"""Who holds which KV block: reference counts, the free list and the order of eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; nothing was taken."""


class BlockPool:
    """Block ids 0 .. num_blocks - 1, each in exactly one of three states.

    *In use*: at least one holder. *Cached*: no holder, contents still valid, waits in order of last use.
    *Blank*: no holder, contents worthless. Whoever allocates or acquires a block releases it once.
    `on_evict` is told each cached block whose contents are about to be lost. Not thread-safe.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks holds nothing: give it at least 1")
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._holders = [0] * num_blocks
        self._valid = [False] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: blank ones and cached ones."""
        return len(self._blank) + len(self._cached)

    def holders(self, block_id: int) -> int:
        """How many hold this block."""
        return self._holders[block_id]

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these cached blocks nobody holds, so that acquiring them makes `num_free` smaller."""
        return sum(1 for block_id in block_ids if not self._holders[block_id])

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks for one holder, blank ones first; raises OutOfBlocks and takes none if they lack."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} KV blocks asked for, {self.num_free} of {self.num_blocks} are free")
        block_ids = [self._take() for _ in range(count)]
        for block_id in block_ids:
            self._holders[block_id] = 1
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that are valid (in use or cached) once more."""
        for block_id in block_ids:
            assert self._valid[block_id], f"block {block_id} has no contents to share"
            if not self._holders[block_id]:
                del self._cached[block_id]
            self._holders[block_id] += 1

    def release(self, block_ids: list[int]) -> None:
        """Let go of a sequence's blocks, given in sequence order.

        The last ones become the first to be evicted: a block is of no use without those before it.
        """
        for block_id in reversed(block_ids):
            assert self._holders[block_id] > 0, f"block {block_id} released more often than taken"
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                continue
            if self._valid[block_id]:
                self._cached[block_id] = None
            else:
                self._blank.append(block_id)

    def mark_valid(self, block_id: int) -> None:
        """The contents of a held block may be reused after its release."""
        assert self._holders[block_id], f"block {block_id} is held by nobody"
        self._valid[block_id] = True

    def mark_worthless(self, block_id: int) -> None:
        """The contents may not be reused; a cached block becomes blank. Does not call `on_evict`."""
        self._valid[block_id] = False
        if block_id in self._cached:
            del self._cached[block_id]
            self._blank.append(block_id)

    def _take(self) -> int:
        if self._blank:
            return self._blank.pop()
        block_id, _ = self._cached.popitem(last=False)
        self._valid[block_id] = False
        self._on_evict(block_id)
        return block_id
