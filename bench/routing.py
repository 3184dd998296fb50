"""What routing costs the server: `python bench/routing.py`. CPU time, one process, no sockets.

Each request has a prompt of 200 to 20,000 tokens, some of it known to some workers; the workers decode for dozens of
sequences and report a pass each between two requests, so that nothing is remembered from the one before. A decision is
the policy asked once; placing a request takes as many as it is held for, the booking and its promised blocks.
Exits 1 where a goal is missed.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from array import array
from collections.abc import Sequence

from trtserve.plugins.api import EngineInfo, PassStats, Request, RequestId, Role, SamplingParams, WorkerId, WorkerLoad
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import HeldRequest, Plan, PolicyConfig, RoutingPolicy, RoutingState
from trtserve.server.router.bookings import Booking
from trtserve.server.router.core import RoutingCore

GOALS_US = {8: 100.0, 64: 300.0}
BLOCK_SIZE = 64
DECISIONS = 2000


def prompts(count: int, seed: int) -> list[tuple[array[int], tuple[int, ...]]]:
    """Token ids and block hashes, of which many share one of 50 beginnings."""
    draw = random.Random(seed)
    beginnings = [array("i", draw.choices(range(32_000), k=draw.randrange(100, 7000))) for _ in range(50)]
    made = []
    for _ in range(count):
        tail = array("i", draw.choices(range(32_000), k=draw.randrange(100, 13_000)))
        prompt = draw.choice(beginnings) + tail
        made.append((prompt, block_hashes(prompt, BLOCK_SIZE)))
    return made


class Timed:
    """A policy, and the CPU time of each of its answers, microseconds."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self.uses_prefixes = policy.uses_prefixes
        self.times_us: list[float] = []

    def assign(self, held: Sequence[HeldRequest], state: RoutingState) -> Plan:
        started = time.thread_time()
        plan = self._policy.assign(held, state)
        self.times_us.append((time.thread_time() - started) * 1e6)
        return plan


def measure(name: str, workers: int) -> tuple[list[float], list[float]]:
    """Microseconds of each decision, and of placing each request."""
    policy = Timed(PluginManager().make_policy(name, PolicyConfig()))
    core = RoutingCore(policy)
    names = [WorkerId(f"agg-{number}") for number in range(workers)]
    for name in names:
        core.add_worker(name, Role.AGG, EngineInfo(BLOCK_SIZE, 20_000, 256, 8192, 131_072, 32_000))
    draw, live, events, now_s, costs = random.Random(1), list[Booking](), dict.fromkeys(names, 0), 1.0, []
    for number, (prompt, hashes) in enumerate(prompts(DECISIONS, 2), 1):
        now_s += 0.01
        for name in names:
            context = sum(len(one.request.prompt) for one in core.workers[name].bookings.values())
            core.pass_ended(
                name, PassStats(0.01, 0, 20, context), WorkerLoad(running=20, free_blocks=15_000), 20, 20, now_s
            )
        request = Request(RequestId(number), prompt, SamplingParams(1000), block_hashes=hashes)
        started = time.thread_time()
        core.hold(request, Role.AGG, now_s)
        bookings = core.plan(Role.AGG, now_s)
        while core.num_held:
            now_s = max(now_s, core.again_at_s(Role.AGG) or now_s + 0.001)
            bookings += core.plan(Role.AGG, now_s)
        costs.append((time.thread_time() - started) * 1e6)
        for booking in bookings:
            core.prompt_done(booking.worker_id, booking.request.id, booking.predicted_cached_tokens)
            core.events(booking.worker_id, events[booking.worker_id], [("stored", hashes)], now_s)
            events[booking.worker_id] += 1
            live.append(booking)
        if len(live) > 20 * workers:
            core.ended(live.pop(draw.randrange(len(live))), now_s)
    return policy.times_us, costs


def main() -> int:
    missed = False
    print(f"{'policy':12} {'workers':>7} {'decision p50, us':>17} {'p99':>8} {'goal p50':>9} {'request p50, us':>16}")
    for policy in ("least_loaded", "kv_arrival", "kv"):
        for workers in (1, 8, 64):
            decisions, requests = measure(policy, workers)
            p50, p99 = statistics.median(decisions), sorted(decisions)[len(decisions) * 99 // 100]
            goal = GOALS_US.get(workers) if policy.startswith("kv") else None
            missed |= goal is not None and p50 > goal
            shown = f"{goal:9.0f}" if goal is not None else " " * 9
            print(f"{policy:12} {workers:7} {p50:17.1f} {p99:8.1f} {shown} {statistics.median(requests):16.1f}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
