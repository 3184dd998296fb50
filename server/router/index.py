"""Which worker holds which KV block: the router's prefix index.

Every block hash has an int whose bit *s* says that the worker in slot *s* holds that block, or soon will: a block
counts from the moment a request that is going to compute it was sent there (`PrefixIndex.reserve`), so that a burst of
siblings goes to one place. There are no timers: the worker's stored event or the request's end ends a reservation.

The hashes are spread over many dicts. A dict is rebuilt as it grows, or as entries come and go, which takes 200 ms at a
million blocks; the event loop must not stand still for so long. Each worker's own blocks are a dict without values
rather than a set, which takes up to twice the memory.
"""

from __future__ import annotations

from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from typing import TypeAlias

_NUM_SHARDS = 256  # a power of two: a hash's low bits choose
_SHARD_BITS = _NUM_SHARDS - 1

_WALK = 8  # in a range this short, looking at every block is cheaper than bisection

_AS_FLAGS = bytes.maketrans(b"01", b"\x00\x01")

_NEVER = -1

Generation: TypeAlias = tuple[int, int]
"""(serial of the first reservation, number of reservations) of a block since it was last stored."""


class TooManyBlocks(Exception):
    """More blocks reported stored than the worker has: what is known of it cannot be true."""


class Reservation:
    """What `reserve` returns; for `unreserve`."""

    __slots__ = ("_hashes", "_serial", "_slot")

    def __init__(self, slot: int, serial: int, hashes: Sequence[int]) -> None:
        self._slot = slot
        self._serial = serial
        self._hashes = hashes


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker's blocks. No block is both stored and reserved: storing it ends its reservations."""

    bit: int
    num_blocks: int
    stored: dict[int, None] = field(default_factory=dict)
    reserved: dict[int, Generation] = field(default_factory=dict)


class PrefixIndex:
    """Block hash -> workers, and worker -> block hashes. Lives on the event loop: no locks, nothing waits.

    A slot is a small number, given by `add_worker` and given to another worker after `remove_worker`; using a slot
    between the two raises KeyError. Hashes are `BlockHash`es.
    """

    def __init__(self) -> None:
        self._shards: tuple[dict[int, int], ...] = tuple({} for _ in range(_NUM_SHARDS))
        self._workers: dict[int, _Worker] = {}  # by slot
        self._serial = 0
        self._changes = 0  # grows whenever an answer of `overlaps` could have changed
        self._late: list[Reservation] = []  # what `reserve` has not entered yet

    def __len__(self) -> int:
        """How many distinct blocks are stored or reserved anywhere."""
        self._enter_late()
        return sum(map(len, self._shards))

    # -------------------------------------------------------------- workers come and go

    def add_worker(self, num_blocks: int) -> int:
        """The lowest free slot. num_blocks: how many blocks the worker can store at most."""
        slot = next(slot for slot in count() if slot not in self._workers)
        self._workers[slot] = _Worker(1 << slot, num_blocks)
        return slot

    def remove_worker(self, slot: int) -> None:
        """Forget the worker, its blocks and its reservations, whose `unreserve` then does nothing. Costs as much as
        removing its own blocks."""
        self._enter_late()
        worker = self._workers.pop(slot)
        self._hide(worker.bit, worker.stored)
        self._hide(worker.bit, worker.reserved)

    def stored(self, slot: int) -> KeysView[int]:
        """A live view of the worker's stored blocks."""
        return self._workers[slot].stored.keys()

    def num_stored(self, slot: int) -> int:
        """Blocks that a worker has."""
        return len(self._workers[slot].stored)

    def num_reserved(self, slot: int) -> int:
        """Blocks that are reserved, however often, and not stored yet."""
        self._enter_late()
        return len(self._workers[slot].reserved)

    # -------------------------------------------------------------- what workers say

    def store(self, slot: int, hashes: Iterable[int]) -> None:
        """The worker has these blocks, known ones allowed; their reservations there are confirmed and end.

        Raises TooManyBlocks, and changes nothing, if it would have more than its num_blocks."""
        self._enter_late()
        worker = self._workers[slot]
        stored = worker.stored
        # One int object for each hash, whatever `hashes` is: the index and the worker's dict share it where it was not
        # reserved before.
        blocks = dict.fromkeys(hashes)
        room = worker.num_blocks - len(stored)
        if len(blocks) > room and sum(block not in stored for block in blocks) > room:
            raise TooManyBlocks(f"a worker with {worker.num_blocks} KV blocks reports more of them stored")
        stored.update(blocks)
        reserved = worker.reserved
        # What was reserved is shown already.
        new = [block for block in blocks if reserved.pop(block, None) is None] if reserved else blocks
        if new:
            self._show(worker.bit, new)

    def remove(self, slot: int, hashes: Iterable[int]) -> None:
        """The worker does not have these blocks any more, unknown ones allowed. Reserved ones go on counting."""
        self._enter_late()
        worker = self._workers[slot]
        stored = worker.stored
        gone = []
        for block in hashes:
            if block in stored:
                del stored[block]
                gone.append(block)
        if gone:
            self._hide(worker.bit, gone)

    def clear(self, slot: int) -> None:
        """The worker has no blocks any more. Reserved ones go on counting."""
        self._enter_late()
        worker = self._workers[slot]
        gone, worker.stored = worker.stored, {}
        self._hide(worker.bit, gone)

    def replace(self, slot: int, hashes: Iterable[int]) -> None:
        """The worker has these blocks and no others.

        Raises TooManyBlocks, and changes nothing, if they are more than its num_blocks."""
        worker = self._workers[slot]
        blocks = dict.fromkeys(hashes)
        if len(blocks) > worker.num_blocks:
            raise TooManyBlocks(f"a worker with {worker.num_blocks} KV blocks reports {len(blocks)} of them stored")
        self.remove(slot, [block for block in worker.stored if block not in blocks])
        self.store(slot, blocks)

    # -------------------------------------------------------------- what was sent to workers

    def reserve(self, slot: int, hashes: Sequence[int]) -> Reservation:
        """A request with this prompt was sent to the worker: the blocks that are not stored there count as if they
        were. `hashes` is kept. End it with `unreserve`.

        They are entered when the index is used next: the request goes its way first."""
        if slot not in self._workers:
            raise KeyError(slot)
        self._serial += 1
        reservation = Reservation(slot, self._serial, hashes)
        self._late.append(reservation)
        return reservation

    def _enter_late(self) -> None:
        if self._late:
            late, self._late = self._late, []
            for reservation in late:
                self._enter(reservation)

    def _enter(self, reservation: Reservation) -> None:
        worker = self._workers[reservation._slot]
        stored, reserved = worker.stored, worker.reserved
        first = (reservation._serial, 1)
        new = [block for block in reservation._hashes if block not in stored]
        if not reserved.keys().isdisjoint(new):
            lacking, new = new, []
            for block in lacking:
                held = reserved.get(block)
                if held is None:
                    new.append(block)
                else:
                    reserved[block] = (held[0], held[1] + 1)
        if new:
            reserved.update(dict.fromkeys(new, first))
            self._show(worker.bit, new)

    def unreserve(self, reservation: Reservation) -> None:
        """The request has ended: what the worker did not store of it counts no longer, unless another request reserved
        it too. Nothing happens the second time, or after `remove_worker`."""
        self._enter_late()
        hashes, reservation._hashes = reservation._hashes, ()
        worker = self._workers.get(reservation._slot)
        if worker is None:
            return
        reserved = worker.reserved
        if reserved.keys().isdisjoint(hashes):
            return  # all were stored, as is the rule
        gone = []
        for block in hashes:
            held = reserved.get(block)
            # A younger generation: this reservation was confirmed, the block was removed, then reserved by others.
            if held is None or held[0] > reservation._serial:
                continue
            if held[1] > 1:
                reserved[block] = (held[0], held[1] - 1)
            else:
                del reserved[block]
                gone.append(block)
        if gone:
            self._hide(worker.bit, gone)

    # -------------------------------------------------------------- looking up

    def overlaps(self, hashes: Sequence[int]) -> dict[int, int]:
        """By slot: how many leading blocks of a prompt are stored or reserved there; workers without the first block
        are left out. hashes: of the prompt's full blocks, in order.

        A long prompt has thousands of blocks and a look at one is a cache miss, so the depths at which workers drop out
        are searched by bisection. Engines evict a prefix after what follows it: the blocks before one that is there are
        there as well. Where a worker has a hole all the same, its answer *n* may lie behind it; block *n - 1* is there
        and block *n* is not, in any case.
        """
        self._enter_late()
        at_first = self.holders(hashes[0]) if hashes else 0
        if not at_first:
            return {}
        at_last = at_first & self.holders(hashes[-1])
        depths: dict[int, int] = {}
        _add(depths, at_last, len(hashes))
        # (low, high, workers that hold block low, those of them that hold block high)
        ranges = [(0, len(hashes) - 1, at_first, at_last)]
        while ranges:
            low, high, at_low, at_high = ranges.pop()
            if at_low == at_high:
                continue
            if high - low <= _WALK:
                self._walk(hashes, low, high, at_low, at_high, depths)
                continue
            middle = (low + high) // 2
            at_middle = at_low & (self.holders(hashes[middle]) | at_high)
            ranges.append((low, middle, at_low, at_middle))
            ranges.append((middle, high, at_middle, at_high))
        return depths

    def _walk(
        self, hashes: Sequence[int], low: int, high: int, at_low: int, at_high: int, depths: dict[int, int]
    ) -> None:
        """Look at each block of a range of `overlaps`, until only those are left that hold its last one."""
        shards = self._shards
        for depth in range(low + 1, high):
            block = hashes[depth]
            still = at_low & (shards[block & _SHARD_BITS].get(block, 0) | at_high)
            if still != at_low:
                _add(depths, at_low ^ still, depth)
                at_low = still
                if still == at_high:
                    return
        _add(depths, at_low ^ at_high, high)

    def holders(self, block: int) -> int:
        """A mask with a bit for the slot of each worker that has the block, or soon will."""
        if self._late:
            self._enter_late()
        return self._shards[block & _SHARD_BITS].get(block, 0)

    def _show(self, bit: int, blocks: Iterable[int]) -> None:
        shards = self._shards
        self._changes += 1
        before: int | None = None
        after = bit
        for block in blocks:
            shard = shards[block & _SHARD_BITS]
            mask = shard.get(block)
            if mask is None:
                shard[block] = bit
            else:
                # Blocks of one chain mostly have the same holders: they share one int object.
                if mask is not before:
                    before, after = mask, mask | bit
                shard[block] = after

    def _hide(self, bit: int, blocks: Iterable[int]) -> None:
        """All of `blocks` are shown."""
        shards = self._shards
        self._changes += 1
        before = after = 0
        for block in blocks:
            shard = shards[block & _SHARD_BITS]
            mask = shard[block]
            if mask == bit:
                del shard[block]
            else:
                if mask is not before:
                    before, after = mask, mask ^ bit
                shard[block] = after


class Overlaps:
    """`PrefixIndex.overlaps` of one prompt, for who asks again and again while others change the index.

    An answer stays true as long as the last block that each worker has is there and the next one is not: two looks,
    where finding the depth takes a dozen.
    """

    __slots__ = ("_changes", "_depths", "_ends", "_hashes", "_holders", "_index")

    def __init__(self, index: PrefixIndex, hashes: Sequence[int]) -> None:
        """hashes: of the prompt's full blocks, in order; kept."""
        self._index = index
        self._hashes = hashes
        self._changes = _NEVER
        self._depths: Mapping[int, int] = {}
        self._holders = 0  # of the first block
        self._ends: list[tuple[int, int]] = []  # (depth, workers that have so many blocks and no more)

    def __call__(self) -> Mapping[int, int]:
        """Hot: asked of every held request in every decision."""
        index = self._index
        if index._late:
            index._enter_late()
        if self._changes != index._changes:
            hashes = self._hashes
            if self._changes == _NEVER:
                self._find()
            elif hashes:
                first = hashes[0]
                holders = index._shards[first & _SHARD_BITS].get(first, 0)
                if holders != self._holders or (holders and not self._is_still_true()):
                    self._find()
            self._changes = index._changes
        return self._depths

    def _is_still_true(self) -> bool:
        """Of a prompt whose first block has the same holders as before."""
        holders, hashes = self._index.holders, self._hashes
        for depth, workers in self._ends:
            if depth > 1 and workers & ~holders(hashes[depth - 1]):
                return False
            if depth < len(hashes) and workers & holders(hashes[depth]):
                return False
        return True

    def _find(self) -> None:
        depths = self._index.overlaps(self._hashes)
        ends: dict[int, int] = {}
        for slot, depth in depths.items():
            ends[depth] = ends.get(depth, 0) | 1 << slot
        self._depths, self._ends = depths, list(ends.items())
        self._holders = sum(ends.values())


def _add(depths: dict[int, int], workers: int, depth: int) -> None:
    """Give each of `workers`, a bit mask, this depth."""
    if not workers & (workers - 1):
        if workers:
            depths[workers.bit_length() - 1] = depth
        return
    flags = f"{workers:b}"[::-1].encode().translate(_AS_FLAGS)
    for slot in compress(count(), flags):
        depths[slot] = depth
