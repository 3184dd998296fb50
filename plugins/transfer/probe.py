"""The little read with which a transfer tries a new peer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trtserve.plugins.transfer_api import Region

PROBE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """`num_bytes` of a peer's memory at `address`, as it exports it."""

    address: int
    num_bytes: int


def probe_span(regions: Iterable[Region]) -> Span | None:
    """What to read of a peer, into memory that is nobody's block: up to PROBE_BYTES, the longest stretch without a gap.
    None of a peer without regions."""
    spans = []
    for region in regions:
        blocks = region.num_blocks if region.stride == region.block_bytes else 1
        spans.append(Span(region.address, min(PROBE_BYTES, blocks * region.block_bytes)))
    return max(spans, key=lambda span: span.num_bytes, default=None)


def bandwidth(num_bytes: int, duration_s: float) -> float:
    """Bytes per second, finite whatever the clock's resolution."""
    return num_bytes / max(duration_s, 1e-7)
