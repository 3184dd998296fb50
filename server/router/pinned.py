"""What an operator says instead of the router learning it (`--pinned-estimates.…`), in the router's terms."""

from __future__ import annotations

import math

from trtserve.plugins.routing_api import Curve, PassTimes
from trtserve.server.router.traffic import TrafficOptions
from trtserve.settings.schema import PinnedEstimates


def pinned_traffic(pinned: PinnedEstimates) -> TrafficOptions:
    """What of the traffic is not to be learnt."""
    return TrafficOptions(pinned.output_tokens, pinned.reuse_probability, pinned.block_life)


def pinned_times(pinned: PinnedEstimates, max_num_tokens: int | None) -> PassTimes | None:
    """None where they are learnt. max_num_tokens: of a pass, to which the prefill curve is taken to hold; None: it
    always does."""
    if pinned.prefill_ms is None or pinned.decode_ms is None:
        return None
    return PassTimes(
        Curve(*pinned.prefill_ms, low=1.0, high=math.inf if max_num_tokens is None else float(max_num_tokens)),
        Curve(*pinned.decode_ms, low=0.0, high=1.0),
    )
