"""`X-Trtserve-Explain: 1`: why a request went where it went, as a header of its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trtserve.plugins.api import RequestId
from trtserve.server.api.asgi import Headers, Scope
from trtserve.server.cluster import ServerCluster
from trtserve.server.router.bookings import Booking

_WANTED = (b"1", b"true")
_MOST_SEQUENCES = 16
"""Told of at most: a header must stay short."""


def is_wanted(scope: Scope) -> bool:
    """Whether the client asked for the header."""
    return any(name == b"x-trtserve-explain" and value.lower() in _WANTED for name, value in scope["headers"])


class Explanation:
    """What was decided for the sequences of one request. Collects from `watch` on until `close`."""

    def __init__(self, cluster: ServerCluster) -> None:
        self._cluster = cluster
        self._watched: dict[RequestId, list[Booking]] = {}

    def watch(self, request_id: RequestId) -> None:
        self._watched[request_id] = self._cluster.explain(request_id)

    def headers(self) -> Headers:
        """One value for each sequence, in order; cached_tokens is missing while the worker has not told."""
        watched = list(self._watched.items())[:_MOST_SEQUENCES]
        values = [_value(self._cluster.notes(request_id), bookings) for request_id, bookings in watched]
        return [(b"x-trtserve-explain", ", ".join(values).encode())] if values else []

    def close(self) -> None:
        for request_id in self._watched:
            self._cluster.explained(request_id)


def _value(notes: Mapping[str, str | float], bookings: Sequence[Booking]) -> str:
    said = "; ".join(f"{name}={value if isinstance(value, str) else round(value, 3)}" for name, value in notes.items())
    return " / ".join([*([said] if said else []), *map(_phase, bookings)]) or "not placed"


def _phase(booking: Booking) -> str:
    fields = {
        "worker": booking.worker_id,
        "overlap_blocks": booking.booked.overlap_blocks,
        "predicted_cached_tokens": booking.predicted_cached_tokens,
        "cached_tokens": booking.cached_tokens,
        "held_ms": round(booking.held_s * 1000, 3),
        "cost_ms": None if booking.cost_ms is None else round(booking.cost_ms, 3),
    }
    return "; ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
