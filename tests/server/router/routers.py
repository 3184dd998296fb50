"""A router over workers that are only capacity."""

import asyncio
from array import array

from trtserve.plugins.api import (
    EngineInfo,
    Request,
    RequestId,
    Role,
    SamplingParams,
    WorkerId,
)
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.metrics import Metrics
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.router import QueueLimits, Router


def make_router(policy="least_loaded", requests=100, tokens=10_000):
    return router_with(PluginManager().make_policy(policy, PolicyConfig()), requests, tokens)


def router_with(policy, requests=100, tokens=10_000):
    return Router(RoutingCore(policy), QueueLimits(requests, tokens), Metrics())


def add(router, name, slots=1, role=Role.AGG):
    router.add_worker(WorkerId(name), role, EngineInfo(16, 100, slots, 512, 4096, 1000))
    router.plan(role)


def a_request(number, num_tokens=10, max_tokens=5):
    return Request(RequestId(number), array("i", [1] * num_tokens), SamplingParams(max_tokens))


async def turn():
    """Let every task that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)
