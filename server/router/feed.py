"""What keeps one worker's part of the prefix index true.

Engines that publish KV events have an `EventFeed`, which knows by the events' numbers whether it has heard all of them,
and asks for the whole set when it has not. For the others `RoutedBlocks` assumes that a worker keeps what it computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, assert_never

from trtserve.server.router.index import PrefixIndex, TooManyBlocks

RESYNC_TIMEOUT_S = 5.0
"""A worker that has not sent its blocks by then is asked again, with its next step."""

ChangeKind: TypeAlias = Literal["stored", "removed", "cleared"]

Change: TypeAlias = tuple[ChangeKind, Sequence[int]]
"""One KV event: what happened to which block hashes; none with ``cleared``."""


class EventFeed:
    """Follows the KV events of one incarnation of a worker, which numbers them from 0.

    Of a worker that missed an event, or said what cannot be, nothing is *known*: its blocks are out of the index (what
    is reserved there stays in) and its events are ignored until `snapshot` brings the whole set.
    """

    def __init__(self, index: PrefixIndex, slot: int, resync: Callable[[], None]) -> None:
        """`slot` is an empty one of `index`. `resync` asks the worker for a snapshot; it must not wait for it."""
        self._index = index
        self._slot = slot
        self._resync = resync
        self._asked_s = float("-inf")
        self.is_known = True
        self.next_event = 0  # the number after all that were heard of, applied or not
        self.gaps = 0
        self.overflows = 0  # times the worker reported more blocks than it has
        self.resyncs = 0  # times it was asked for its blocks

    def apply(self, first_event: int, changes: Sequence[Change], now_s: float) -> None:
        """The events of one step, in order; first_event: the number of the first of them, or of the next one to come.

        A step without events need be told only while nothing is known, or where its number is not `next_event`: it
        shows a gap and the time. Events that were applied before are skipped. now_s: monotonic."""
        end = first_event + len(changes)
        if not self.is_known:
            self.next_event = max(self.next_event, end)
            if now_s - self._asked_s >= RESYNC_TIMEOUT_S:
                self._ask(now_s)
            return
        missing = first_event - self.next_event
        if end <= self.next_event and missing <= 0:
            return
        self.next_event = end
        if missing > 0:
            self.gaps += 1
            self._forget()
            self._ask(now_s)
            return
        try:
            for kind, hashes in changes[-missing:]:
                self._change(kind, hashes)
        except TooManyBlocks:
            self.overflows += 1
            self._forget()
            self._ask(now_s)

    def snapshot(self, next_event: int, hashes: Sequence[int]) -> None:
        """All blocks stored there after the events below `next_event`. One that is older than events heard of since is
        ignored; if that leaves the worker unknown, or this one is too large, it is asked again with a later step."""
        if next_event < self.next_event:
            return
        self.next_event = next_event
        try:
            self._index.replace(self._slot, hashes)
        except TooManyBlocks:
            self.overflows += 1
            self._forget()
        else:
            self.is_known = True

    def _change(self, kind: ChangeKind, hashes: Sequence[int]) -> None:
        match kind:
            case "stored":
                self._index.store(self._slot, hashes)
            case "removed":
                self._index.remove(self._slot, hashes)
            case "cleared":
                self._index.clear(self._slot)
            case _:
                assert_never(kind)

    def _forget(self) -> None:
        self.is_known = False
        self._index.clear(self._slot)

    def _ask(self, now_s: float) -> None:
        self._asked_s = now_s
        self.resyncs += 1
        self._resync()


class RoutedBlocks:
    """The blocks that a worker without KV events should have: those of the prompts it computed, least recently used
    ones evicted beyond its number of blocks."""

    def __init__(self, index: PrefixIndex, slot: int, num_blocks: int) -> None:
        """`slot` is an empty one of `index`, with `num_blocks` blocks."""
        self._index = index
        self._slot = slot
        self._num_blocks = num_blocks
        self._last_used: OrderedDict[int, None] = OrderedDict()  # the oldest first

    def computed(self, hashes: Sequence[int]) -> None:
        """The worker has computed the prompt with these full blocks, or taken them from its cache."""
        kept = hashes[: self._num_blocks]
        last_used = self._last_used
        new = [block for block in kept if block not in last_used]
        # From the last block to the first, as engines free them: what is evicted first is the end of a prompt.
        for block in reversed(kept):
            last_used[block] = None
            last_used.move_to_end(block)
        evicted = [last_used.popitem(last=False)[0] for _ in range(len(last_used) - self._num_blocks)]
        self._index.remove(self._slot, evicted)
        self._index.store(self._slot, new)
