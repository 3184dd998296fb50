"""Attention-DP ranks: parts of one worker with KV caches of their own, which the router takes for workers.

A worker with several ranks is known to the router by an id for each, the worker's and the rank's number; everybody else
knows the one worker. Requests go to its process with the rank in them.
"""

from __future__ import annotations

from collections.abc import Mapping

from trtserve.plugins.api import EngineInfo, WorkerId, WorkerLoad

_SEPARATOR = "/"  # in no worker's own id


def routed_ids(worker_id: WorkerId, info: EngineInfo) -> list[WorkerId]:
    """The ids by which the router knows a worker, by rank."""
    if info.num_ranks == 1:
        return [worker_id]
    return [WorkerId(f"{worker_id}{_SEPARATOR}{rank}") for rank in range(info.num_ranks)]


def split(routed_id: WorkerId) -> tuple[WorkerId, int | None]:
    """(the worker, the rank; None where the worker has one only)."""
    worker_id, separator, rank = routed_id.partition(_SEPARATOR)
    return WorkerId(worker_id), int(rank) if separator else None


def total_load(loads: Mapping[int, WorkerLoad]) -> WorkerLoad:
    """Of all ranks of a worker together."""
    if len(loads) == 1:
        return next(iter(loads.values()))
    names = WorkerLoad.__struct_fields__
    return WorkerLoad(**{name: sum(getattr(load, name) for load in loads.values()) for name in names})
