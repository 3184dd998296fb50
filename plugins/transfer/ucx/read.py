"""One read: which gets are to be posted, which are under way, and how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer.ucx import structs
from trtserve.plugins.transfer.ucx.libucp import FIRST_ERROR_POINTER, LibUcp, request_status
from trtserve.plugins.transfer_api import Completion, TransferId, TransferOutcome

_OWN_FAULTS = frozenset(
    {structs.ERR_NO_RESOURCE, structs.ERR_NO_MEMORY, structs.ERR_INVALID_PARAM, structs.ERR_UNSUPPORTED}
)
"""Statuses of a get that say nothing against the peer."""


class Gets(NamedTuple):
    """Runs of one region, none too long for a get."""

    runs: Iterable[Run]
    rkey: int  # ucp_rkey_h
    param: Any  # byref of a RequestParam


class Read:
    """Gets are posted in order and looked at in order: one that ends early waits for those before it.

    Once `outcome` is set nothing more is posted; a read that was never stopped has none and is DONE. The read has ended
    when none of its requests is under way any more: only that says that nothing writes into its targets (see
    `Endpoint`).
    """

    def __init__(
        self, library: LibUcp, transfer_id: TransferId, gets: Iterator[Gets], begun_s: float, deadline_s: float
    ) -> None:
        """begun_s, deadline_s: of the monotonic clock."""
        self.id = transfer_id
        self.deadline_s = deadline_s
        self.outcome: TransferOutcome | None = None
        self.reason = ""
        self.under_way: deque[tuple[int, int]] = deque()  # (request, num_bytes)
        self._library = library
        self._gets = gets
        self._runs: Iterator[Run] = iter(())
        self._rkey, self._param = 0, None
        self._begun_s = begun_s
        self._num_bytes = 0
        self._all_posted = False

    def stop(self, outcome: TransferOutcome, reason: str) -> None:
        """Post nothing more and end thus, unless an end is decided already."""
        if self.outcome is None:
            self.outcome, self.reason = outcome, reason

    def post(self, endpoint: int, max_gets: int, max_bytes: int) -> tuple[int, int]:
        """Post until that many are under way or nothing is left; returns (gets, bytes) posted. The last one may
        go past max_bytes."""
        num_gets = num_bytes = 0
        while self.outcome is None and num_gets < max_gets and num_bytes < max_bytes:
            posted_gets, posted_bytes = self._post_runs(endpoint, max_gets - num_gets, max_bytes - num_bytes)
            num_gets, num_bytes = num_gets + posted_gets, num_bytes + posted_bytes
            if num_gets >= max_gets or num_bytes >= max_bytes:
                break
            following = next(self._gets, None)
            if following is None:
                self._all_posted = True
                break
            self._runs, self._rkey, self._param = iter(following.runs), following.rkey, following.param
        return num_gets, num_bytes

    def _post_runs(self, endpoint: int, max_gets: int, max_bytes: int) -> tuple[int, int]:
        # A turn of this loop is what a scattered block costs beside its copying.
        get, add = self._library.ucp_get_nbx, self.under_way.append
        rkey, param = self._rkey, self._param
        num_gets = num_bytes = 0
        for source, target, size in self._runs:
            request = get(endpoint, target, size, source, rkey, param)
            if request is None:  # done at once
                self._num_bytes += size
                continue
            if request >= FIRST_ERROR_POINTER:
                self._fail(request_status(request))
                break
            add((request, size))
            num_gets += 1
            num_bytes += size
            if num_gets >= max_gets or num_bytes >= max_bytes:
                break
        return num_gets, num_bytes

    def reap(self) -> tuple[int, int]:
        """Take back the requests that ended; returns (gets, bytes)."""
        check, free, under_way = self._library.ucp_request_check_status, self._library.ucp_request_free, self.under_way
        num_gets = num_bytes = 0
        while under_way:
            request, size = under_way[0]
            status = check(request)
            if status == structs.IN_PROGRESS:
                break
            under_way.popleft()
            free(request)
            num_gets, num_bytes = num_gets + 1, num_bytes + size
            if status == structs.OK:
                self._num_bytes += size
            else:
                self._fail(status)
        return num_gets, num_bytes

    @property
    def has_ended(self) -> bool:
        return not self.under_way and (self._all_posted or self.outcome is not None)

    def completion(self, now_s: float) -> Completion:
        """The end of a read that has ended."""
        outcome = self.outcome or TransferOutcome.DONE
        return Completion(self.id, outcome, self._num_bytes, now_s - self._begun_s, self.reason)

    def _fail(self, status: int) -> None:
        outcome = TransferOutcome.FAILED if status in _OWN_FAULTS else TransferOutcome.PEER_LOST
        self.stop(outcome, f"a get failed: {self._library.describe(status)}")
