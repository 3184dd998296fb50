"""Workers with the simulated engine that hand KV to each other through shared memory, and the server's end of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from tests.server.workers.conftest import House, Listener, Sink, until
from tests.server.workers.kv_worker import NUM_ROWS, make_worker
from trtserve.plugins.api import FinishReason, Request, RequestId, SamplingParams, WorkerId
from trtserve.server.kv_peers import KVPeers
from trtserve.server.workers.kv_messages import KVUsage


class ThreadSite:
    """A worker on a thread of this process."""

    def __init__(self, *arguments, **changes):
        self.worker = make_worker(*arguments, **changes)
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def end(self):
        self.worker.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()


class ProcessSite:
    """A worker in a process of its own."""

    def __init__(self, endpoint, runtime_dir, worker_id, incarnation, **changes):
        arguments = [endpoint, str(runtime_dir), worker_id, incarnation]
        command = [sys.executable, "-m", "tests.server.workers.kv_worker", json.dumps([arguments, changes])]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[3])

    def end(self):
        self.process.kill()
        self.process.wait()


class IntroducingListener(Listener):
    """Introduces workers to each other, as the server's does."""

    def __init__(self):
        super().__init__()
        self.peers = KVPeers()

    def worker_ready(self, client):
        super().worker_ready(client)
        self.peers.ready(client)

    def worker_gone(self, client):
        super().worker_gone(client)
        self.peers.gone(client)


@dataclass
class Sites:
    """Starts workers, and asks the things that every test wants to know of them."""

    house: House
    folder: Path
    started: list[ThreadSite | ProcessSite] = field(default_factory=list)

    async def start(self, worker_id, kind=ThreadSite, **changes):
        """The site and its client, ready, and known to the others."""
        incarnation = 1 + len(self.started)
        site = kind(self.house.link.endpoint, self.folder, worker_id, incarnation, **changes)
        self.started.append(site)
        pool = self.house.pool
        await until(lambda: any(client.kv.incarnation == incarnation for client in pool), 20)
        client = pool[WorkerId(worker_id)]
        await until(lambda: client.state == "ready", 20)
        return site, client

    async def pair(self, kind=ThreadSite, **changes):
        """A prefill and a decode worker that are connected: their clients."""
        starts = (self.start(name, kind, **changes) for name in ("prefill-0", "decode-0"))
        (_, prefill), (_, decode) = await asyncio.gather(*starts)
        await connected(decode)
        return prefill, decode

    def end(self):
        for site in self.started:
            site.end()


async def connected(decode, num_peers=1):
    await usage_of(decode, lambda usage: usage.peers == num_peers)


async def usage_of(client, condition) -> KVUsage:
    """What a heartbeat says, once the condition is true of it; never one that was sent before this call."""
    seen = [client.kv.usage]

    def is_met():
        if client.kv.usage is not seen[-1]:
            seen.append(client.kv.usage)
        return len(seen) > 2 and condition(seen[-1])  # the first new one may have been on its way

    try:
        await until(is_met, 10)
    except AssertionError:
        raise AssertionError(f"{client.worker_id} still says {client.kv.usage}") from None
    return seen[-1]


async def nothing_is_left(*clients, num_rows=NUM_ROWS):
    for client in clients:
        await usage_of(client, lambda usage: (usage.rows_free, usage.leases, usage.fetches) == (num_rows, 0, 0))


def a_prompt(number, num_tokens=200, max_tokens=1):
    """Prompts of different numbers share no block."""
    tokens = array("i", [5 + number % 900, *(5 + (number + i * i) % 900 for i in range(num_tokens - 1))])
    return Request(RequestId(number), tokens, SamplingParams(max_tokens, temperature=0.0, ignore_eos=True))


def resumed(request, tokens, max_tokens=4):
    """What the decode worker gets after the prefill worker's tokens."""
    sampling = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request.id, request.prompt + array("i", tokens), sampling, num_resumed=len(tokens))


async def prefilled(prefill, request):
    """The tokens and the whole handle of a prompt that was computed."""
    sink = Sink()
    finish = await asyncio.wait_for(prefill.run(request, sink, keep_kv=True), 10)
    assert finish.reason is FinishReason.LENGTH
    return sink.tokens, finish.kv_handle


async def decoded(decode, request):
    """Run to the end; the sink says what was cached."""
    sink = Sink()
    finish = await asyncio.wait_for(decode.run(request, sink), 10)
    assert finish.reason is FinishReason.LENGTH, finish
    return sink


async def handed_over(prefill, decode, request):
    """All of it, as the server does it; the number of prompt tokens that the decode worker found cached."""
    tokens, handle = await prefilled(prefill, request)
    decode.kv.fetch(request, handle)
    fetched = await decode.kv.fetched(request.id, 10)
    is_valid = await prefill.kv.release(handle.lease_id, 5) and fetched.ok
    decode.kv.commit(request.id, is_valid)
    sink = await decoded(decode, resumed(request, tokens))
    return sink.cached_tokens
