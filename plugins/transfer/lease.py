"""Who holds which rows of a worker's KV region: free, in somebody's hands, quarantined, or under a lease.

Plain data without clocks, locks or I/O: whoever owns these objects passes the time and keeps calls apart. The lease
protocol is the same for every transfer: a lease ends by itself unless it is extended, and whoever has read under one
asks afterwards whether it held until then (`LeaseTable.release`). It is timed on the clock of the worker that has the
rows only.
"""

from __future__ import annotations

import secrets
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_FREE, _TAKEN, _QUARANTINED = range(3)


class RowPool:
    """The rows 0 to num_rows - 1. Gives runs of adjacent rows where it can, since those move as one piece: the
    smallest free run that holds all, else the longest ones."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_free = 0
        self.num_quarantined = 0
        self._states = bytearray([_TAKEN]) * num_rows
        self._by_length: list[tuple[int, int]] = []  # (length, first row) of every free run, sorted
        self._length_from: dict[int, int] = {}  # first row of a free run → its length
        self._first_until: dict[int, int] = {}  # row after a free run → its first row
        if num_rows:
            self.give_back(range(num_rows))

    def take(self, num_rows: int) -> list[int]:
        """So many free rows, or all there are if those are fewer. The caller has to give them back."""
        rows: list[int] = []
        while len(rows) < num_rows and self._by_length:
            needed = num_rows - len(rows)
            place = min(bisect_left(self._by_length, (needed, -1)), len(self._by_length) - 1)
            length, first = self._by_length[place]
            self._remove_run(first, length)
            if length > needed:
                self._add_run(first + needed, length - needed)
            rows += range(first, first + min(length, needed))
        for row in rows:
            self._states[row] = _TAKEN
        self.num_free -= len(rows)
        return rows

    def quarantine(self, rows: Sequence[int]) -> None:
        """Rows that were taken, and that something may still write to. `give_back` ends it. Raises ValueError for rows
        that are not taken."""
        self._check(rows, (_TAKEN,))
        for row in rows:
            self._states[row] = _QUARANTINED
        self.num_quarantined += len(rows)

    def give_back(self, rows: Sequence[int]) -> None:
        """Make rows free that were taken or quarantined. Raises ValueError, and changes nothing, for others."""
        self._check(rows, (_TAKEN, _QUARANTINED))
        for row in rows:
            self.num_quarantined -= self._states[row] == _QUARANTINED
            self._states[row] = _FREE
        self.num_free += len(rows)
        for first, length in _runs(sorted(rows)):
            self._merge_run(first, length)

    def _check(self, rows: Sequence[int], states: tuple[int, ...]) -> None:
        if len(set(rows)) != len(rows):
            raise ValueError(f"a row appears twice among {len(rows)}")
        for row in rows:
            if not 0 <= row < self.num_rows or self._states[row] not in states:
                raise ValueError(f"row {row} of {self.num_rows} is not in the hands of whoever names it")

    def _merge_run(self, first: int, length: int) -> None:
        before = self._first_until.get(first)
        if before is not None:
            self._remove_run(before, first - before)
            first, length = before, length + first - before
        after = self._length_from.get(first + length)
        if after is not None:
            self._remove_run(first + length, after)
            length += after
        self._add_run(first, length)

    def _add_run(self, first: int, length: int) -> None:
        insort(self._by_length, (length, first))
        self._length_from[first] = length
        self._first_until[first + length] = first

    def _remove_run(self, first: int, length: int) -> None:
        del self._by_length[bisect_left(self._by_length, (length, first))]
        del self._length_from[first]
        del self._first_until[first + length]


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, length) of each run of adjacent rows; rows: sorted."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[start], end - start
            start = end


@dataclass(slots=True)
class _Lease:
    ends_s: float
    rows: list[int] = field(default_factory=list)


class LeaseTable:
    """The leases of one worker. now_s: of any clock that only goes forward, the same for all calls.

    ttl_s: seconds that a lease lasts from its grant, and from each extension. Ids begin at random, so that a lease of
    a former process of the same worker is not mistaken for one of this.
    """

    def __init__(self, pool: RowPool, ttl_s: float) -> None:
        self._pool = pool
        self._ttl_s = ttl_s
        self._leases: dict[int, _Lease] = {}
        self._next_id = secrets.randbits(61) + 1
        self.num_rows = 0  # under all leases
        self.num_granted = self.num_released = self.num_expired = 0

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, now_s: float) -> int:
        """A new lease, of no rows so far; its id is above 0."""
        lease_id = self._next_id
        self._next_id += 1
        self._leases[lease_id] = _Lease(now_s + self._ttl_s)
        self.num_granted += 1
        return lease_id

    def add(self, lease_id: int, rows: Sequence[int], now_s: float) -> bool:
        """Put rows, taken from the pool, under a lease, which then gives them back. False if it has ended: they stay
        the caller's."""
        lease = self._live(lease_id, now_s)
        if lease is None:
            return False
        lease.rows += rows
        self.num_rows += len(rows)
        return True

    def extend(self, lease_id: int, now_s: float) -> bool:
        """Let a lease last ttl_s from now on; False if it has ended."""
        lease = self._live(lease_id, now_s)
        if lease is None:
            return False
        lease.ends_s = now_s + self._ttl_s
        return True

    def release(self, lease_id: int, now_s: float) -> bool:
        """End a lease. Whether it had lasted until now, so that what was read of its rows is right. May be called
        again, and with ids that never were: those are False."""
        lease = self._live(lease_id, now_s)
        if lease is None:
            return False
        self._end(lease_id)
        self.num_released += 1
        return True

    def expire(self, now_s: float) -> int:
        """End every lease whose time is over; how many those were. To be called on a timer, whatever else happens."""
        over = [lease_id for lease_id, lease in self._leases.items() if lease.ends_s <= now_s]
        for lease_id in over:
            self._end(lease_id)
        self.num_expired += len(over)
        return len(over)

    def _live(self, lease_id: int, now_s: float) -> _Lease | None:
        lease = self._leases.get(lease_id)
        return lease if lease is not None and lease.ends_s > now_s else None

    def _end(self, lease_id: int) -> None:
        rows = self._leases.pop(lease_id).rows
        self.num_rows -= len(rows)
        self._pool.give_back(rows)
