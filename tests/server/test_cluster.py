"""What the API asks of the cluster, with workers that are played at the wire."""

from __future__ import annotations

import asyncio

import pytest

from tests.server.router.routers import turn
from trtserve.plugins.api import EngineInfo, Role, WorkerId
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server import cluster as cluster_module
from trtserve.server.cluster import ServerCluster
from trtserve.server.metrics import Metrics
from trtserve.server.reports import WorkerReports
from trtserve.server.router.core import IndexCheck, RoutingCore
from trtserve.server.router.router import QueueLimits, Router
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient

INFO = EngineInfo(16, 100, 8, 64, 4096, 1000)
KNOWN = IndexCheck(was_known=True, stored_blocks=0, missing_blocks=0, extra_blocks=0)


@pytest.fixture
def make_cluster():
    def make(*answers):
        """A cluster with a ready worker for each of these: whether it is reached, and whether it answers at once, as
        the socket hands over what has come while something is sent."""
        metrics = Metrics()
        router = Router(RoutingCore(PluginManager().make_policy("kv", PolicyConfig())), QueueLimits(10, 1000), metrics)
        reports = WorkerReports(router, lambda: None, lambda client: None)
        cluster = ServerCluster(router, metrics)
        clients = [WorkerClient(WorkerId(f"agg-{number}"), Role.AGG, reports) for number in range(len(answers))]

        def connect(client, is_reached, is_quick):
            def send(message):
                assert isinstance(message, wire.Resync)
                if is_quick:
                    client.on_blocks(wire.blocks_of(0, []))
                return is_reached

            client.connected(send, 1)
            reports.worker_connected(client)
            client.ready(INFO)
            reports.worker_ready(client)

        for client, answer in zip(clients, answers, strict=True):
            connect(client, *answer)
        cluster.attach(clients)
        return cluster, router

    return make


async def test_answers_count_that_come_before_all_workers_are_asked(make_cluster):
    cluster, router = make_cluster((True, True), (True, True))
    assert await cluster.check_index() == {"agg-0": KNOWN, "agg-1": KNOWN}
    assert not any(router._checks.values())


async def test_workers_that_are_not_reached_or_do_not_answer_have_no_check(make_cluster, monkeypatch):
    monkeypatch.setattr(cluster_module, "_CHECK_DEADLINE_S", 0.01)
    cluster, router = make_cluster((True, True), (False, False), (True, False))
    assert await cluster.check_index() == {"agg-0": KNOWN, "agg-1": None, "agg-2": None}
    await turn()
    assert not any(router._checks.values()), "nobody waits any more"


async def test_without_workers_there_is_nothing_to_check(make_cluster):
    cluster, _ = make_cluster()
    assert await cluster.check_index() == {}


async def test_a_worker_that_goes_meanwhile_is_not_waited_for(make_cluster):
    """Nor is its successor, which has another cache."""
    cluster, router = make_cluster((True, True), (True, False))
    checking = asyncio.create_task(cluster.check_index())
    await turn()
    assert not checking.done()
    router.remove_worker(WorkerId("agg-1"))
    async with asyncio.timeout(5):
        assert await checking == {"agg-0": KNOWN, "agg-1": None}
    assert not any(router._checks.values())
