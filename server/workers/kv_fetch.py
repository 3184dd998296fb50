"""One request's fetch of KV: what was asked for, what is being read, and what of it can be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from trtserve.plugins.api import RequestId, TokenIds
from trtserve.server.workers.kv_messages import KVFetch, KVFetched
from trtserve.server.workers.kv_transport import Read


@dataclass(slots=True, eq=False)
class Part:
    """Blocks that are read together. rows: of this worker, one a block."""

    first_block: int
    rows: list[int]
    read: Read | None = None
    is_over: bool = False
    is_done: bool = False  # over, and the bytes are there


@dataclass(slots=True, eq=False)
class Fetch:
    """Belongs to the transport's thread until it is `report`ed; then to whoever took it out of the reported ones.

    clock: seconds, monotonic.
    """

    request_id: RequestId
    prompt: TokenIds = field(repr=False)
    cache_salt: str
    clock: Callable[[], float] = time.monotonic
    orders: list[KVFetch] = field(default_factory=list)  # not begun yet
    parts: list[Part] = field(default_factory=list)
    next_block: int | None = None  # first one that is neither in the prefix cache nor in a part; None: not known yet
    has_all_orders: bool = False
    is_reported: bool = False
    is_dropped: bool = False  # nobody wants it any more
    shortage: str = ""  # why there are fewer blocks than there were to read
    lane: str = ""
    num_bytes: int = 0
    num_usable: int = 0  # parts from the front that can be written; set by `report`
    busy_s: float = 0.0
    begun_s: float = field(init=False)
    _busy_since_s: float = 0.0

    def __post_init__(self) -> None:
        self.begun_s = self.clock()

    def begin(self, part: Part) -> None:
        """A part is going to be read."""
        if not self.num_open:
            self._busy_since_s = self.clock()
        self.parts.append(part)

    def end(self, part: Part, is_done: bool, num_bytes: int) -> None:
        """A part's read is over."""
        part.is_over, part.is_done = True, is_done
        self.num_bytes += num_bytes
        if not self.num_open:
            self.busy_s += self.clock() - self._busy_since_s

    @property
    def num_open(self) -> int:
        """Parts whose reads may still write."""
        return sum(not part.is_over for part in self.parts)

    @property
    def is_complete(self) -> bool:
        """Whether everything asked for has been read."""
        return self.has_all_orders and not self.orders and not self.num_open

    def report(self, failure: str = "") -> KVFetched:
        """How it ended; from here on `usable` stands. failure: why it was given up, where it was."""
        self.is_reported = True
        while self.num_usable < len(self.parts) and self.parts[self.num_usable].is_done:
            self.num_usable += 1
        num_blocks = sum(len(part.rows) for part in self.usable())
        reason = failure or self.shortage
        return KVFetched(
            self.request_id, not failure, num_blocks, self.num_bytes, self.busy_s, self.lane, reason[:4096]
        )

    def usable(self) -> Iterator[Part]:
        """Parts from the front without a gap, all read. Only after `report`."""
        return iter(self.parts[: self.num_usable])
