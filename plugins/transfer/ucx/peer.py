"""An imported peer: its endpoint, its reads in order, and what becomes of them when it is lost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from trtserve.plugins.transfer.ucx.endpoint import Endpoint
from trtserve.plugins.transfer.ucx.read import Read
from trtserve.plugins.transfer_api import PeerInfo, Region, TransferOutcome

MAX_GETS = 256
MAX_BYTES = 32 << 20
"""Most that is under way of one peer: two pieces, so that the next one is there when a piece ends."""

DRAIN_S = 0.05
"""How long gets may go on after a deadline. Over CMA they end by themselves; what does not has a peer that hangs, and
only closing the connection ends it."""


class UcxPeer:
    """One incarnation of one worker. Reads are served in order, the first one first."""

    def __init__(self, info: PeerInfo, key: int, endpoint: Endpoint, regions: Mapping[str, Region]) -> None:
        """key: of `endpoint`. regions: the peer's, by name."""
        self.info = info
        self.key = key
        self.endpoint = endpoint
        self.regions = regions
        self.rkeys: dict[str, int] = {}  # ucp_rkey_h, by region
        self.lane = "ucx"
        self.bandwidth_bytes_per_s = 0.0
        self.reads: list[Read] = []
        self.lost: str | None = None  # why
        self._free_gets = MAX_GETS
        self._free_bytes = MAX_BYTES

    @property
    def is_gone(self) -> bool:
        """Whether nothing of a lost peer is left."""
        return self.lost is not None and not self.reads and self.endpoint.is_closed()

    def add(self, read: Read) -> None:
        """Serve a read after the others."""
        if self.lost is not None:
            read.stop(TransferOutcome.PEER_LOST, self.lost)
        self.reads.append(read)

    def lose(self, reason: str) -> None:
        """Close the connection; every read ends PEER_LOST, or as was decided before. Idempotent."""
        if self.lost is not None:
            return
        self.lost = reason
        for read in self.reads:
            read.stop(TransferOutcome.PEER_LOST, reason)
        self.endpoint.close()

    def advance(self, now_s: float) -> list[Read]:
        """Take back what ended, see to deadlines and post more; returns the reads that have ended."""
        if not self.reads:
            return []
        for read in self.reads:
            self._reap(read)
            # One that is over is so in time or not: a process that was late itself may only see it now.
            if now_s >= read.deadline_s and not read.has_ended:
                self._expire(read, now_s)
        for read in self.reads:
            if self._free_gets <= 0 or self._free_bytes <= 0 or self.lost is not None:
                break
            num_gets, num_bytes = read.post(self.endpoint.handle, self._free_gets, self._free_bytes)
            self._free_gets, self._free_bytes = self._free_gets - num_gets, self._free_bytes - num_bytes
        return self._take_ended()

    def due_s(self, now_s: float) -> float:
        """When `advance` has something to do, whatever comes before; both of the monotonic clock."""
        due = (read.deadline_s if read.deadline_s > now_s else read.deadline_s + DRAIN_S for read in self.reads)
        return min(due, default=math.inf)

    def _reap(self, read: Read) -> None:
        num_gets, num_bytes = read.reap()
        self._free_gets, self._free_bytes = self._free_gets + num_gets, self._free_bytes + num_bytes

    def _expire(self, read: Read, now_s: float) -> None:
        read.stop(TransferOutcome.TIMED_OUT, "the deadline passed")
        if read.under_way and now_s >= read.deadline_s + DRAIN_S:
            self.lose("a read was under way past its deadline, so the connection was closed")

    def _take_ended(self) -> list[Read]:
        lost = next((read for read in self.reads if read.outcome is TransferOutcome.PEER_LOST), None)
        if lost is not None:  # the others end with it
            self.lose(lost.reason)
        ended = [read for read in self.reads if read.has_ended]
        if ended:
            self.reads = [read for read in self.reads if not read.has_ended]
        return ended
