"""Aggregated serving: one worker takes a request from its first prompt token to its last output token."""

from __future__ import annotations

from collections.abc import Mapping

from trtserve.plugins.api import Cluster, Finish, Mode, ModeConfig, OutputSink, Request, Role
from trtserve.plugins.hooks import hookimpl


class AggregatedMode:
    """One worker of the role agg for each request."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    @property
    def roles(self) -> Mapping[Role, int]:
        return {Role.AGG: self._workers}

    async def run(self, request: Request, sink: OutputSink, cluster: Cluster) -> Finish:
        with await cluster.place(request, Role.AGG) as placement:
            return await cluster.run(placement, request, sink)


@hookimpl
def make_mode(name: str, config: ModeConfig) -> Mode | None:
    return AggregatedMode(config.workers) if name == "agg" else None
