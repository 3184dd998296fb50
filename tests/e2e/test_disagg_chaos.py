"""Workers of a disaggregated server that are killed, stopped or cut off, in each phase of a request.

Every request ends with the tokens of the undisturbed run, or with an error that says what happened, in bounded time;
and nothing stays held. The simulated engine's tokens follow from the prompt, and it checks every byte of KV that it is
given.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess, TrtserveProcess, eventually, sim_arguments
from tests.e2e.sse import events
from trtserve.plugins.manager import PluginManager

PATH = "/v1/completions"
NUM_BLOCKS = 512
SILENCE_S = 2.5
TOKENS = 60
WORKER = re.compile(r"worker=([\w-]+)")
_numbers = count(1)

pytestmark = pytest.mark.timeout(120)


def new_prompt(length: int = 1500) -> list[int]:
    """Nobody has its KV yet. 1,500 tokens take six passes."""
    own = next(_numbers)
    return [300 + (own * 7 + place * own) % 600 for place in range(length)]


@pytest.fixture(scope="module")
def expected(serve_module: Serve) -> Callable[[list[int]], str]:
    """What one aggregated worker answers."""
    server = serve_module("--max-num-tokens", "256", num_blocks=NUM_BLOCKS, options=("speedup=100",)).until_ready()

    def answer(prompt: list[int]) -> str:
        body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return server.client.post(PATH, json=body).raise_for_status().json()["choices"][0]["text"]

    return answer


@pytest.fixture(scope="module")
def server(serve_module: Serve) -> ServerProcess:
    flags = ("--mode", "disagg", "--prefill-workers", "2", "--decode-workers", "2", "--disagg-policy", "always")
    limits = ("--max-num-tokens", "256", "--worker-silence-timeout", str(SILENCE_S), "--request-timeout", "40")
    started = serve_module(*flags, *limits, num_blocks=NUM_BLOCKS, options=("speedup=0.4",)).until_ready()
    all_up(started)
    return started


def all_up(server: ServerProcess, count: int = 4) -> None:
    server.until_metric("trtserve_worker_up", lambda value: value == count, timeout_s=30)


class NobodyBusy(Exception):
    """The request was over before anybody looked: on a machine that stalls a prefill of 0.3 s is soon missed."""


def busy_worker(server: ServerProcess, role: str) -> str:
    """The id of the worker of a role that has a sequence. Raises NobodyBusy."""

    def found() -> str | None:
        workers = server.client.get("/v1/workers").json()["workers"]
        return next((one["id"] for one in workers if one["role"] == role and one["booked_sequences"]), None)

    try:
        return eventually(found, f"a {role} worker has a request", timeout_s=3.0)
    except AssertionError as error:
        raise NobodyBusy from error


def run_struck(client: httpx.Client, prompt: list[int], after_events: int, strike: Callable[[str], None]) -> list[dict]:
    """Stream an answer; strike after so many events, 0: as soon as a worker has the request. `strike` is told which
    prefill worker gave the first token, "" if none has yet."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    seen: list[dict] = []
    with ExitStack() as stack:
        if not after_events:
            stack.callback(struck_beside(partial(strike, "")))
        with client.stream("POST", PATH, json=body, headers={"X-Trtserve-Explain": "1"}) as response:
            if response.status_code != 200:
                return [response.read() and response.json()]
            for event in events(response.iter_lines()):
                seen.append(event)
                if len(seen) == after_events:
                    strike(WORKER.findall(response.headers["x-trtserve-explain"])[0])
    return seen


def struck_beside(strike: Callable[[], None]) -> Callable[[], None]:
    """Strike on a thread of its own, beside a request that has no answer yet; returns what waits for it."""
    pool = ThreadPoolExecutor(1)
    struck = pool.submit(strike)

    def join() -> None:
        pool.shutdown()
        struck.result()

    return join


def check(seen: list[dict], expected_text: str) -> None:
    if "error" in seen[-1]:
        assert seen[-1]["error"]["code"] in {"worker_lost", "no_worker"}, seen[-1]
        text = "".join(one["choices"][0]["text"] for one in seen[:-1])
        assert expected_text.startswith(text), "what came before the error is right"
    else:
        assert "".join(choice["text"] for one in seen for choice in one["choices"]) == expected_text


PHASES = {"prefill": 0, "hand-over": 1, "decode": 12}


KILLED = [(signal.SIGKILL, role, phase) for role in ("prefill", "decode") for phase in PHASES]
STOPPED = [(signal.SIGSTOP, "prefill", "prefill"), (signal.SIGSTOP, "decode", "hand-over")]


@pytest.mark.parametrize(("number", "role", "phase"), KILLED + STOPPED)
def test_a_worker_goes(server: ServerProcess, expected, number: signal.Signals, role: str, phase: str):
    """A stopped one is lost after SILENCE_S, and given five more seconds to end by itself."""

    def strike(prefill_worker: str) -> None:
        is_known = role == "prefill" and prefill_worker
        os.kill(server.worker_pid(prefill_worker if is_known else busy_worker(server, role)), number)

    for is_last in (False, False, False, True):
        prompt, begun_s = new_prompt(), time.monotonic()
        try:
            seen = run_struck(server.client, prompt, PHASES[phase], strike)
            break
        except NobodyBusy:
            if is_last:
                raise
    assert time.monotonic() - begun_s < 15, "bounded by the silence that makes a worker a lost one"
    check(seen, expected(prompt))
    assert "error" not in seen[-1], "there was another worker of each role"
    server.until_metric("trtserve_worker_restarts_total", lambda value: value >= 1, timeout_s=20)
    all_up(server)
    server.until_idle(4 * NUM_BLOCKS)
    assert rows_in_use(server) == 0


def rows_in_use(server: ServerProcess) -> int:
    """Rows under leases, being read or quarantined; waits for heartbeats."""

    def free() -> bool:
        ports = [one["kv"] for one in server.client.get("/v1/workers").json()["workers"]]
        return all(port is not None and port["usage"]["rows_free"] == port["rows"] for port in ports)

    eventually(free, "all rows are free", timeout_s=40)
    return 0


# ------------------------------------------------------------------ networks that are cut


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)


@pytest.fixture
def places() -> Iterator[dict[str, str]]:
    """Role → network namespace. Each has a link `ctl` to this one, and both have a link `kv` to each other."""
    own = f"{os.getpid()}-{next(_numbers)}"
    names = {role: f"trt-{role[0]}-{own}" for role in ("prefill", "decode")}
    if shutil.which("ip") is None or os.geteuid() != 0 or ip("netns", "add", names["prefill"]).returncode:
        pytest.skip("network namespaces cannot be made here")
    try:
        commands = [("netns", "add", names["decode"])]
        for place, name in enumerate(names.values(), 1):
            # The kernel takes its time to forget the links of a namespace that is gone: no name twice.
            here = f"trtc{next(_numbers)}-{os.getpid() % 10_000}"
            commands += [
                ("link", "add", here, "type", "veth", "peer", "name", "ctl", "netns", name),
                ("addr", "add", f"10.123.{50 + place}.1/24", "dev", here),
                ("link", "set", here, "up"),
                ("-n", name, "addr", "add", f"10.123.{50 + place}.2/24", "dev", "ctl"),
                ("-n", name, "link", "set", "ctl", "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        first, second = names.values()
        commands += [
            ("-n", first, "link", "add", "kv", "type", "veth", "peer", "name", "kv", "netns", second),
            ("-n", first, "addr", "add", "10.123.60.1/24", "dev", "kv"),
            ("-n", second, "addr", "add", "10.123.60.2/24", "dev", "kv"),
            ("-n", first, "link", "set", "kv", "up"),
            ("-n", second, "link", "set", "kv", "up"),
        ]
        for arguments in commands:
            made = ip(*arguments)
            assert made.returncode == 0, (arguments, made.stderr)
        yield names
    finally:
        for name in names.values():
            ip("netns", "del", name)


class Elsewhere(TrtserveProcess):
    """A worker started by hand in a network namespace."""

    def __init__(self, namespace: str, *arguments: str, environment: dict[str, str]) -> None:
        self._namespace = namespace
        super().__init__(*arguments, environment=environment)

    def command(self, arguments: tuple[str, ...]) -> list[str]:
        return ["ip", "netns", "exec", self._namespace, *super().command(arguments)]


@contextmanager
def link_down(namespace: str) -> Iterator[None]:
    ip("-n", namespace, "link", "set", "kv", "down")
    try:
        yield
    finally:
        ip("-n", namespace, "link", "set", "kv", "up")


def cut_link(cut: ExitStack, namespace: str, _prefill_worker: str) -> None:
    cut.enter_context(link_down(namespace))


@pytest.mark.parametrize("transfer", ["ucx", "nixl"])
def test_the_link_between_workers_is_cut(serve: Serve, sim_model: Path, expected, places, transfer, unused_port):
    if PluginManager().problem("transfer", transfer) is not None:
        pytest.skip(f"{transfer} is not installed")
    token = {"TRTSERVE_WORKER_TOKEN": "a-long-secret-of-the-tests"}
    flags = ("--mode", "disagg", "--prefill-workers", "0", "--decode-workers", "0", "--disagg-policy", "always")
    limits = ("--max-num-tokens", "256", "--transfer", transfer)
    server = serve(*flags, *limits, "--worker-endpoint", f"tcp://0.0.0.0:{unused_port}", **token)
    server.until_output("waiting for workers")
    with ExitStack() as stack:
        for place, (role, namespace) in enumerate(places.items(), 1):
            connect = ("--connect", f"tcp://10.123.{50 + place}.1:{unused_port}", "--worker-id", f"{role}-0")
            arguments = sim_arguments(
                sim_model, *limits, *connect, "--role", role, num_blocks=NUM_BLOCKS, options=("speedup=5",)
            )
            environment = token | {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "kv"}
            stack.enter_context(Elsewhere(namespace, "worker", *arguments, environment=environment))
        server.until_ready()
        all_up(server, 2)
        whole = new_prompt(200)
        check(run_struck(server.client, whole, -1, lambda _: None), expected(whole))
        before = server.metrics()
        assert sum(value for name, value in before.items() if name.startswith("trtserve_kv_fetched_bytes_total")) > 0
        for after_events in (0, 1):
            prompt = new_prompt()
            with ExitStack() as cut:
                seen = run_struck(
                    server.client,
                    prompt,
                    after_events,
                    lambda _, cut=cut: cut.enter_context(link_down(places["decode"])),
                )
            check(seen, expected(prompt))
            assert "error" not in seen[-1], "the decode worker computes what does not come"
        server.until_idle(2 * NUM_BLOCKS)
        assert rows_in_use(server) == 0
