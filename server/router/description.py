"""The router's state for people and tools: GET /v1/router/state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trtserve.server.router.bookings import Worker
from trtserve.server.router.core import RoutingCore


def describe(core: RoutingCore, policy: str, now_s: float) -> dict[str, Any]:
    """JSON-able. now_s: the router's clock."""
    return {
        "policy": policy,
        "held": {"requests": core.num_held, "prompt_tokens": core.held_tokens},
        "index": {"blocks": len(core.index)},
        "estimates": asdict(core.traffic.report()),
        "pass_times": {str(role): asdict(core.pass_times(role).report()) for role in core.roles()},
        "workers": [_worker(core, worker, now_s) for worker in core.workers.values()],
    }


def _worker(core: RoutingCore, worker: Worker, now_s: float) -> dict[str, Any]:
    view, feed = worker.view, worker.feed
    state: dict[str, Any] = {
        "id": view.worker_id,
        "role": view.role,
        "booked_requests": view.booked_requests,
        "booked_tokens": view.booked_tokens,
        "context_tokens": view.context_tokens,
        "decoding": view.decoding,
        "is_draining": worker.is_draining,
        "is_prefilling": view.is_prefilling,
        "pass_ends_in_ms": round(max(0.0, view.pass_ends_s - now_s) * 1000, 3),
        "queued_prompt_tokens": view.queued_tokens,
        "num_blocks": view.info.num_blocks,
        "unused_blocks": view.unused_blocks,
        "stored_blocks": core.index.num_stored(view.slot),
        "reserved_blocks": core.index.num_reserved(view.slot),
        "eviction_loss": round(view.eviction_loss, 4),
    }
    if feed is not None:
        state["events"] = {
            "is_known": feed.is_known,
            "gaps": feed.gaps,
            "overflows": feed.overflows,
            "resyncs": feed.resyncs,
        }
    return state
