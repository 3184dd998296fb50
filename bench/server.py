"""What the server process costs per token and per request, with the simulated engine on another core.

    python bench/server.py [--runs 3] [--only NAME] [--skip-memory]

Prints a Markdown table of medians. The floor is a bare uvloop server that writes the same events, measured in the same
run: machines and neighbours differ, the ratio to the floor less so. CPU is the process's own, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from load import Result, request_bytes, run_load

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_INSTANT = 1e12


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load, and what is read off it."""

    name: str
    speedup: float
    concurrency: int
    requests: int
    input_words: int
    output_tokens: int
    unit: str
    target: float


SCENARIOS = (
    Scenario("paced: 256 streams, a token every 6 to 9 ms", 1.0, 256, 512, 100, 400, "µs/token", 14),
    Scenario("burst: 64 streams, all tokens at once", _INSTANT, 64, 1500, 100, 400, "µs/token", 9),
    Scenario("200 tokens in, 1 out, 64 streams", _INSTANT, 64, 8000, 200, 1, "ms/request", 0.45),
    Scenario("4,000 tokens in, 100 out, 64 streams", _INSTANT, 64, 1500, 4000, 100, "ms/request", 3),
    Scenario("time to first token, 1 stream", _INSTANT, 1, 1000, 200, 1, "ms", 0.8),
)
_MEMORY_PROMPTS = 12_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a scenario's name")
    parser.add_argument("--skip-memory", action="store_true")
    arguments = parser.parse_args()
    _pin(0, {1})
    print("| load | server | floor | ratio | target |\n|---|---|---|---|---|")
    for scenario in SCENARIOS:
        if arguments.only in scenario.name:
            print(_row(scenario, arguments.runs), flush=True)
    if not arguments.skip_memory and arguments.only in "memory":
        print(_memory_row(), flush=True)


def _row(scenario: Scenario, runs: int) -> str:
    """Server and floor in turn, so that a change of the machine's speed meets both."""
    server, floor = [], []
    for _ in range(runs):
        with _server(scenario.speedup) as (pid, port):
            server.append(_measure(scenario, pid, port))
        if scenario.speedup == 1:  # the floor's tokens are paced, too
            with _floor() as (pid, port):
                floor.append(_measure(scenario, pid, port))
    ours = statistics.median(server)
    bare = f"{statistics.median(floor):.2f} | {ours / statistics.median(floor):.1f}" if floor else " | "
    return f"| {scenario.name} | {ours:.2f} {scenario.unit} | {bare} | ≤ {scenario.target:g} {scenario.unit} |"


def _measure(scenario: Scenario, pid: int, port: int) -> float:
    requests = [
        request_bytes(number, scenario.input_words, scenario.output_tokens, f"127.0.0.1:{port}")
        for number in range(scenario.requests)
    ]
    warm_up = requests[: scenario.concurrency]
    _run(port, warm_up, scenario.concurrency)
    before_s = _cpu_seconds(pid)
    result = _run(port, requests, scenario.concurrency)
    cpu_s = _cpu_seconds(pid) - before_s
    if scenario.unit == "ms":
        return statistics.median(result.first_event_s) * 1e3
    if scenario.unit == "ms/request":
        return cpu_s / len(requests) * 1e3
    return cpu_s / len(requests) / scenario.output_tokens * 1e6


def _memory_row() -> str:
    with _server(_INSTANT) as (pid, port):
        levels = []
        for part in range(4):
            count = _MEMORY_PROMPTS // 4
            requests = [request_bytes(n, 4000, 1, f"127.0.0.1:{port}") for n in range(part * count, (part + 1) * count)]
            _run(port, requests, 64)
            levels.append(_resident_mib(pid))
    shown = " → ".join(f"{level:.0f}" for level in levels)
    return f"| resident memory after 3,000 → … → 12,000 distinct 4,000-token prompts | {shown} MiB | | | ≤ 150 MiB |"


def _run(port: int, requests: list[bytes], concurrency: int) -> Result:
    result: Result = uvloop.run(run_load(port, requests, concurrency))
    if result.failed:
        raise SystemExit(f"{result.failed} of {len(requests)} requests failed")
    return result


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20


def _pin(pid: int, cores: set[int]) -> None:
    os.sched_setaffinity(pid, cores & os.sched_getaffinity(0) or os.sched_getaffinity(0))


@contextmanager
def _server(speedup: float) -> Iterator[tuple[int, int]]:
    """A server on core 0 and its worker, started by hand so that it is no child of the server's, on core 1."""
    port, endpoint = 8390, f"ipc://{tempfile.mkdtemp()}/workers.sock"
    trtserve = str(Path(sys.executable).parent / "trtserve")
    engine = ("--engine", "sim", "--engine-option", f"speedup={speedup:g}", "--num-blocks", "60000")
    engine += ("--max-num-tokens", "8192", "--log-level", "warning")
    serve = (trtserve, *engine, "--workers", "0", "--worker-endpoint", endpoint, "--port", str(port))
    work = (trtserve, "worker", *engine, "--connect", endpoint, "--worker-id", "agg-0")
    environment = os.environ | {"TRTSERVE_WORKER_TOKEN": "bench"}
    server = subprocess.Popen(("taskset", "-c", "0", *serve), env=environment, stdout=subprocess.DEVNULL)
    worker = subprocess.Popen(("taskset", "-c", "1", *work), env=environment)
    try:
        _wait_until_ready(port)
        yield server.pid, port
    finally:
        for process in (server, worker):
            process.terminate()
        for process in (server, worker):
            process.wait(30)


def _wait_until_ready(port: int) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            with urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.05)
    raise SystemExit("the server did not become ready within a minute")


@contextmanager
def _floor() -> Iterator[tuple[int, int]]:
    port = 8391
    process = subprocess.Popen(("taskset", "-c", "0", sys.executable, __file__, "--floor", str(port)))
    try:
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s and not _listens(port):
            time.sleep(0.02)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class _FloorConnection(asyncio.Protocol):
    """Answers with as many events as max_tokens says, one each 6 ms while others wait too, else all at once."""

    HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    EVENT = b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk","created":1,'
    EVENT += (
        b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
    )

    def __init__(self, live: set[_FloorConnection]) -> None:
        self._live = live
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.rpartition(b"Content-Length: ")[2]):
            return
        self._received = b""
        self._left = int(body.rpartition(b'"max_tokens": ')[2].partition(b",")[0])
        self._transport.write(self.HEAD)  # type: ignore[attr-defined]
        self._live.add(self)

    def tick(self) -> None:
        self._left -= 1
        self._transport.write(b"%x\r\n%b\r\n" % (len(self.EVENT), self.EVENT))  # type: ignore[attr-defined]
        if not self._left:
            self._live.discard(self)
            self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")  # type: ignore[attr-defined]


async def _serve_floor(port: int) -> None:
    live: set[_FloorConnection] = set()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: _FloorConnection(live), "127.0.0.1", port)
    while True:
        await asyncio.sleep(0.006)
        for connection in list(live):
            connection.tick()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--floor"]:
        uvloop.run(_serve_floor(int(sys.argv[2])))
    else:
        main()
