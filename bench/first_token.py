"""What a first token cannot take less time than, of the parts that trtserve is made of.

    python bench/first_token.py

Prints medians in milliseconds, from the client where there is one: hypercorn answering one event from a plain ASGI
application; encoding 200 words; a message to a worker process and back over ZeroMQ, handed to a thread and back there
as an engine's is; the sum of these; and all of it as one chain in one process, with the body parsed and the template
rendered, since what runs once in a millisecond finds cold caches and takes longer than in a loop of its own. The server
on core 0, client and worker on core 1, as in `bench/server.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop
import zmq

sys.path.insert(0, str(Path(__file__).parent))
from load import request_bytes, run_load

_PORT = 8392
_REQUESTS = 1000
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\ndata: [DONE]\n\n'


def main() -> None:
    os.sched_setaffinity(0, {1})
    rows = {
        "hypercorn, one event from a plain ASGI application": _hypercorn_ms("--hypercorn"),
        "the tokenizer, 200 words": _encode_ms(),
        "ZeroMQ to a worker process, a thread there, and back": _round_trip_ms(),
    }
    rows["together"] = sum(rows.values())
    os.sched_setaffinity(0, {1})
    rows["one chain of these, with orjson and the template"] = _chain_ms()
    print("| part | median ms |\n|---|---|")
    for name, duration_ms in rows.items():
        print(f"| {name} | {duration_ms:.2f} |")


def _hypercorn_ms(*arguments: str) -> float:
    process = subprocess.Popen(("taskset", "-c", "0", sys.executable, __file__, *arguments))
    try:
        _wait_for_port()
        requests = [request_bytes(number, 200, 1, f"127.0.0.1:{_PORT}") for number in range(_REQUESTS)]
        result = uvloop.run(run_load(_PORT, requests, 1))
    finally:
        process.terminate()
        process.wait(10)
    assert not result.failed
    return statistics.median(result.first_event_s) * 1e3


def _chain_ms() -> float:
    endpoint = f"ipc://{tempfile.mkdtemp()}/chain.sock"
    worker = subprocess.Popen(("taskset", "-c", "1", sys.executable, __file__, "--worker", endpoint))
    try:
        return _hypercorn_ms("--chain", endpoint)
    finally:
        worker.terminate()
        worker.wait(10)


def _wait_for_port() -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", _PORT)) == 0:
                return
        time.sleep(0.02)


async def _application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _EVENT})


def _serve_hypercorn(application: Any = _application) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{_PORT}"]
    config.errorlog = None
    uvloop.run(serve(application, config, mode="asgi"))


class _Chain:
    """Each step that an answer needs, and nothing that checks, counts, routes or cancels."""

    def __init__(self, endpoint: str) -> None:
        from trtserve.server.text.chat_template import load_chat_template
        from trtserve.server.text.tokenizer import load_tokenizer

        folder = _model()
        self._render, self._encode = load_chat_template(folder).render, load_tokenizer(folder).encode_inline
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        self._router.bind(endpoint)
        self._worker = self._router.recv_multipart()[0]
        self._answer: asyncio.Future[bytes] | None = None

    def _drain(self) -> None:
        while int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            answer = self._router.recv_multipart(zmq.NOBLOCK)[1]
            if self._answer is not None:
                self._answer.set_result(answer)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().add_reader(self._router.fileno(), self._drain)
            await _application(scope, receive, send)
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message["body"], message.get("more_body", False)
        ids = self._encode(self._render(orjson.loads(raw)["messages"]), False)
        self._answer = asyncio.get_running_loop().create_future()
        self._router.send_multipart((self._worker, ids.tobytes()))
        self._drain()
        await self._answer
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _EVENT})


def _model() -> Any:
    from trtserve.server.model.resolve import resolve_model
    from trtserve.settings.schema import Settings

    settings = Settings()
    return resolve_model(settings.model, settings.cache_dir)


def _encode_ms() -> float:
    from trtserve.server.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(_model())
    durations_s = []
    for number in range(_REQUESTS):
        body = request_bytes(number, 200, 1, "-").partition(b"\r\n\r\n")[2]
        text = json.loads(body)["messages"][0]["content"]
        started_s = time.perf_counter()
        tokenizer.encode_inline(text, False)
        durations_s.append(time.perf_counter() - started_s)
    return statistics.median(durations_s) * 1e3


def _round_trip_ms() -> float:
    endpoint = f"ipc://{tempfile.mkdtemp()}/floor.sock"
    os.sched_setaffinity(0, {0})
    process = subprocess.Popen(("taskset", "-c", "1", sys.executable, __file__, "--worker", endpoint))
    try:
        return uvloop.run(_ask_worker(endpoint))
    finally:
        process.terminate()
        process.wait(10)


async def _ask_worker(endpoint: str) -> float:
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(endpoint)
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    answers: list[list[bytes]] = []

    def drain() -> None:
        while int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            answers.append(router.recv_multipart(zmq.NOBLOCK))
            arrived.set()

    loop.add_reader(router.fileno(), drain)
    durations_s = []
    for _ in range(_REQUESTS):
        while not answers:
            arrived.clear()
            drain()
            if not answers:
                await arrived.wait()
        worker = answers.pop()[0]
        await asyncio.sleep(0.0005)  # as between the requests of one client: everybody sleeps
        started_s = time.perf_counter()
        router.send_multipart((worker, bytes(900)))
        arrived.clear()
        drain()
        while not answers:
            await arrived.wait()
        durations_s.append(time.perf_counter() - started_s)
    loop.remove_reader(router.fileno())
    router.close(linger=0)
    return statistics.median(durations_s) * 1e3


def _work(endpoint: str) -> None:
    """Answers everything, by way of a second thread."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(endpoint)
    dealer.send(b"here")
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    done: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    wake = os.eventfd(0, os.EFD_NONBLOCK)

    def compute() -> None:
        while True:
            done.put(inbox.get()[:100])
            os.eventfd_write(wake, 1)

    threading.Thread(target=compute, daemon=True).start()
    poller = zmq.Poller()
    poller.register(dealer, zmq.POLLIN)
    poller.register(wake, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if dealer in ready:
            inbox.put(dealer.recv())
        if wake in ready:
            os.eventfd_read(wake)
            while not done.empty():
                dealer.send(done.get())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--hypercorn"]:
            _serve_hypercorn()
        case ["--chain", endpoint]:
            _serve_hypercorn(_Chain(endpoint))
        case ["--worker", endpoint]:
            _work(endpoint)
        case _:
            main()
