"""A ROUTER socket that plays the server, and a worker that talks to it."""

import collections
import queue
import threading
from array import array

import zmq

from tests.server.workers.conftest import HELLO
from trtserve.plugins.api import EngineConfig, FinishReason, Request, RequestId, SamplingParams
from trtserve.plugins.engines.sim import make_engine
from trtserve.server.workers import wire
from trtserve.server.workers.worker import Worker, WorkerIdentity


class Server:
    """A bound ROUTER that does what it is told."""

    def __init__(self, endpoint):
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.identity = b""
        self._received = collections.deque()  # of a batch

    def receive(self, *kinds):
        """The next message of one of these kinds; heartbeats and steps in between are skipped unless asked for."""
        while True:
            if not self._received:
                self.identity, data = self.socket.recv_multipart()
                self._received += wire.decode_from_worker(data)
            message = self._received.popleft()
            if not kinds or isinstance(message, kinds):
                return message
            assert not isinstance(message, wire.Failed), message

    def say(self, message):
        self.socket.send_multipart((self.identity, wire.encode(message)))

    def welcome(self):
        """From hello to ready; returns the messages in between."""
        between = [self.receive(wire.Hello)]
        self.say(wire.Welcome())
        while not isinstance(between[-1], wire.Ready):
            between.append(self.receive())
        return between

    def close(self):
        self.context.destroy(linger=0)


class Running:
    """A worker on a thread, as its process's main thread would run it."""

    def __init__(self, server, connect_timeout_s=10.0, warm_up_s=10.0, **options):
        config = EngineConfig("", num_blocks=64, options={"speedup": 1e9, "vocab_size": 1000, **options})
        identity = WorkerIdentity(HELLO, server.endpoint, connect_timeout_s)
        self.worker = Worker(identity, lambda: make_engine("sim", config), warm_up_s)
        self._codes = queue.Queue()
        self._thread = threading.Thread(target=lambda: self._codes.put(self.worker.run()), daemon=True)
        self._thread.start()

    def exit_code(self):
        code = self._codes.get(timeout=10)
        self._thread.join(10)
        return code


def submit(number, num_tokens=3, max_tokens=4):
    prompt = array("i", range(5, 5 + num_tokens))
    return wire.submit_of(Request(RequestId(number), prompt, SamplingParams(max_tokens, temperature=0.0)))


def tokens_until_end(server, number):
    tokens = []
    while True:
        step = server.receive(wire.Step)
        ids = array("Q", step.request_ids).tolist()
        counts = array("H", step.counts).tolist() if step.counts else [1] * len(ids)
        flat = iter(wire.token_ids_of(step.token_ids))
        for request_id, count in zip(ids, counts, strict=True):
            row = [next(flat) for _ in range(count)]
            tokens += row if request_id == number else ()
        for detail in step.details:
            if detail.request_id == number and detail.finish_reason is not None:
                return tokens, FinishReason(detail.finish_reason)
