"""The server's end of the wire for real: a bound link, a pool, and peers with DEALER sockets of their own."""

import asyncio
import time
from array import array
from dataclasses import dataclass, field

import msgspec
import pytest
import zmq

from trtserve.plugins.api import EngineInfo, Finish, Request, RequestId, Role, SamplingParams, WorkerId
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient
from trtserve.server.workers.link import Link
from trtserve.server.workers.pool import Expectation, WorkerPool

INFO = EngineInfo(block_size=16, num_blocks=100, max_num_seqs=8, max_num_tokens=512, max_seq_len=1024, vocab_size=1000)
HELLO = wire.Hello(
    wire_version=wire.WIRE_VERSION,
    worker_id=WorkerId("agg-0"),
    incarnation=1,
    token="token",
    pid=1,
    role=Role.AGG,
    engine="sim",
    model_fingerprint="model",
    tokenizer_fingerprint="tokenizer",
    trtserve_version="0",
)


async def until(condition, deadline_s=15.0):
    """Give the loop turns until something is true."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        await asyncio.sleep(0.002)


def a_request(number=1, num_tokens=3):
    return Request(RequestId(number), array("i", range(1, num_tokens + 1)), SamplingParams(4))


@pytest.fixture
def request_of_one_token():
    return a_request(num_tokens=1)


@dataclass
class Listener:
    """Writes down which workers came and went, and what they reported."""

    heard: list[tuple[str, str]] = field(default_factory=list)
    reports: list[tuple] = field(default_factory=list)

    def worker_connected(self, client):
        self.reports.append(("connected", client.worker_id))

    def on_step(self, client, step):
        if step.events:
            self.reports.append(("events", step.first_event, step.events))
        for detail in step.details:
            if detail.cached_tokens is not None:
                self.reports.append(("prompt done", detail.request_id, detail.cached_tokens))
        self.reports.append(("step", step.number))

    def on_blocks(self, client, blocks):
        self.reports.append(("blocks", blocks.next_event, list(wire.hashes_of(blocks.hashes))))

    def worker_ready(self, client):
        self.heard.append(("ready", client.worker_id))

    def worker_gone(self, client):
        self.heard.append(("gone", client.worker_id))


@dataclass
class Sink:
    """What a request was given."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    cached_tokens: int | None = None

    def push(self, token_ids, logprobs):
        self.tokens += token_ids
        self.logprobs += logprobs or ()

    def cached(self, num_tokens):
        self.cached_tokens = num_tokens


class Peer:
    """A worker as the server sees one: a DEALER socket with something to say."""

    def __init__(self, context, endpoint, hello):
        self.hello = hello
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # a test's loop must not wait for itself
        self.socket.setsockopt(zmq.ROUTING_ID, f"{hello.worker_id}#{hello.incarnation:x}".encode())
        self.socket.connect(endpoint)

    def say(self, message):
        self.say_bytes(wire.encode(message))

    def say_bytes(self, *frames):
        self.socket.send_multipart(frames)

    async def hears(self):
        """The next message of the server."""
        heard = []

        def receive():
            try:
                heard.append(wire.decode_to_worker(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return False
            return True

        await until(receive)
        return heard[0]

    async def joins(self):
        """Hello, welcome, ready."""
        self.say(self.hello)
        assert await self.hears() == wire.Welcome()
        self.say(wire.Ready(INFO))


@dataclass
class House:
    """The parts of the server that workers talk to."""

    pool: WorkerPool
    listener: Listener
    link: Link
    context: zmq.Context
    drained: list[None]
    peers: list[Peer] = field(default_factory=list)

    def peer(self, **changes):
        peer = Peer(self.context, self.link.endpoint, msgspec.structs.replace(HELLO, **changes))
        self.peers.append(peer)
        return peer

    async def worker(self, **changes) -> tuple[Peer, WorkerClient]:
        """A peer that has joined, and the server's view of it."""
        peer = self.peer(**changes)
        await peer.joins()
        client = self.pool[peer.hello.worker_id]
        await until(lambda: client.state == "ready")
        return peer, client


@pytest.fixture
async def house(tmp_path):
    listener, drained = Listener(), []
    pool = WorkerPool(Expectation("token", "model", "tokenizer"), listener)
    context = zmq.Context(io_threads=1)

    def on_drained():
        drained.append(None)
        pool.account()

    with Link(f"ipc://{tmp_path}/socket", pool.on_message, on_drained) as link:
        pool.attach(link.send)
        house = House(pool, listener, link, context, drained)
        yield house
        for peer in house.peers:
            peer.socket.close()
    context.destroy(linger=0)


@pytest.fixture
async def running():
    """Starts runs as tasks and ends those that are left."""
    tasks: list[asyncio.Task[Finish]] = []

    def start(client, request, sink=None):
        tasks.append(asyncio.create_task(client.run(request, sink or Sink())))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def supervision(house, tmp_path):
    from tests.server.workers.supervision import Supervision  # it builds upon this module

    supervision = Supervision(house, tmp_path)
    yield supervision
    if supervision.task is not None:
        supervision.task.cancel()
        await asyncio.wait({supervision.task})


@pytest.fixture
def server(tmp_path):
    from tests.server.workers.played_server import Server

    server = Server(f"ipc://{tmp_path}/server")
    yield server
    server.close()


@pytest.fixture
def run(server):
    """Starts workers that talk to the played server, and ends them."""
    from tests.server.workers.played_server import Running

    started = []

    def run(**settings):
        started.append(Running(server, **settings))
        return started[-1]

    yield run
    for one in started:
        one.worker.stop()
        one._thread.join(10)
        assert not one._thread.is_alive()


@pytest.fixture
async def sites(tmp_path, monkeypatch):
    """Workers that hand KV to each other."""
    monkeypatch.setattr("trtserve.server.workers.worker._HEARTBEAT_S", 0.03)  # tests wait for what heartbeats say
    from tests.server.workers.kv_sites import IntroducingListener, Sites

    listener = IntroducingListener()
    pool = WorkerPool(Expectation("token", "model", "tokenizer"), listener)
    context = zmq.Context(io_threads=1)
    with Link(f"ipc://{tmp_path}/socket", pool.on_message, pool.account) as link:
        pool.attach(link.send)
        sites = Sites(House(pool, listener, link, context, []), tmp_path)
        yield sites
        await asyncio.to_thread(sites.end)
    context.destroy(linger=0)
