"""The rows through which a worker's KV goes, with their leases, for several threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from trtserve.plugins.transfer.lease import LeaseTable, RowPool
from trtserve.server.workers.kv_messages import KVUsage

LEASE_S = 30.0


class Staging:
    """Which rows are whose. Any thread may call; nothing here waits for more than another such call.

    clock: seconds, monotonic.
    """

    def __init__(self, num_rows: int, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = RowPool(num_rows)
        self._leases = LeaseTable(self._pool, lease_s)
        self._clock = clock
        self._lock = threading.Lock()

    def take(self, num_rows: int) -> list[int]:
        """Free rows, at most so many. They are the caller's until `keep` or `give_back`."""
        with self._lock:
            if self._pool.num_free < num_rows:
                self._leases.expire(self._clock())
            return self._pool.take(num_rows)

    def give_back(self, rows: Sequence[int]) -> None:
        """Taken or quarantined rows that nobody reads or writes any more."""
        with self._lock:
            self._pool.give_back(rows)

    def quarantine(self, rows: Sequence[int]) -> None:
        """Taken rows of a read that was given up and may still write; `give_back` once it has ended."""
        with self._lock:
            self._pool.quarantine(rows)

    def grant(self) -> int:
        """The id of a new lease."""
        with self._lock:
            return self._leases.grant(self._clock())

    def keep(self, lease_id: int, rows: Sequence[int]) -> bool:
        """Put taken rows under a lease; where it has ended they are free now, and this is False."""
        with self._lock:
            if self._leases.add(lease_id, rows, self._clock()):
                return True
            self._pool.give_back(rows)
            return False

    def extend(self, lease_ids: Sequence[int]) -> None:
        with self._lock:
            now_s = self._clock()
            for lease_id in lease_ids:
                self._leases.extend(lease_id, now_s)

    def release(self, lease_id: int) -> bool:
        """Whether the lease had lasted until now."""
        with self._lock:
            return self._leases.release(lease_id, self._clock())

    def expire(self) -> int:
        """End the leases whose time is over; how many."""
        with self._lock:
            return self._leases.expire(self._clock())

    def usage(self) -> KVUsage:
        """What concerns rows and leases."""
        with self._lock:
            pool, leases = self._pool, self._leases
            in_hand = pool.num_rows - pool.num_free - pool.num_quarantined - leases.num_rows
            return KVUsage(
                rows_free=pool.num_free,
                rows_leased=leases.num_rows,
                rows_fetched=in_hand,
                rows_quarantined=pool.num_quarantined,
                leases=len(leases),
                leases_granted_total=leases.num_granted,
                leases_released_total=leases.num_released,
                leases_expired_total=leases.num_expired,
            )
