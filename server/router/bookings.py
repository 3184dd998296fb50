"""What the router keeps of a worker, and of a request that it placed there."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from trtserve.plugins.api import Request, RequestId, WorkerId
from trtserve.plugins.routing_api import WorkerView
from trtserve.server.router.feed import EventFeed, RoutedBlocks
from trtserve.server.router.index import Reservation
from trtserve.server.router.traffic import EvictionAge
from trtserve.server.router.worker_load import Booked, TrackedLoad


@dataclass(slots=True, eq=False)
class Worker:
    """All that the router keeps of one ready worker."""

    tracked: TrackedLoad
    feed: EventFeed | None  # engines that publish events
    routed: RoutedBlocks | None  # engines that do not
    eviction: EvictionAge
    bookings: dict[RequestId, Booking] = field(default_factory=dict)
    is_draining: bool = False  # takes no more requests; see `RoutingCore.drain`
    counts: WorkerView = field(init=False)  # the same object as `view` with what is counted only, which costs nothing

    def __post_init__(self) -> None:
        self.counts = self.tracked.counts

    @property
    def view(self) -> WorkerView:
        """With all that is estimated."""
        return self.tracked.view


class Booking(msgspec.Struct, eq=False):
    """One request on one worker, from the decision until `RoutingCore.ended`."""

    worker: Worker
    booked: Booked
    held_s: float
    cost_ms: float | None
    reservation: Reservation | None  # of the blocks it is about to create
    cached_tokens: int | None = None  # as the worker told with the first token

    @property
    def request(self) -> Request:
        """The sequence."""
        return self.booked.request

    @property
    def worker_id(self) -> WorkerId:
        """The worker's, or its rank's."""
        return self.worker.counts.worker_id

    @property
    def predicted_cached_tokens(self) -> int:
        """Prompt tokens that need not be computed there, as the index had it."""
        return len(self.request.prompt) - self.booked.uncached_tokens
