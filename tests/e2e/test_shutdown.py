"""Ending: what runs is finished or told, nothing new begins, and nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.e2e.process import Serve, ServerProcess, eventually
from tests.e2e.sse import events, finish_of

PATH = "/v1/completions"


def running_stream(server: ServerProcess, max_tokens: int):
    """A stream whose first event has come; a context manager that gives the rest of its events."""
    return server.client.stream("POST", PATH, json={"prompt": "a", "max_tokens": max_tokens, "stream": True})


def runtime_dir(server: ServerProcess) -> Path:
    """The private folder, as a worker's command line tells it."""
    command = Path(f"/proc/{server.worker_pids()[0]}/cmdline").read_bytes().decode().split("\0")
    return Path(command[command.index("--config") + 1]).parent


def code_of_new_request(server: ServerProcess) -> str:
    return server.client.post(PATH, json={"prompt": "a", "max_tokens": 1}).json().get("error", {}).get("code", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish(serve: Serve, number: int):
    server = serve().until_ready()
    folder = runtime_dir(server)
    assert folder.stat().st_mode & 0o777 == 0o700
    with running_stream(server, 200) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        server.signal(number)
        eventually(lambda: server.client.get("/ready").status_code == 503, "not ready")
        assert server.client.get("/ready").json() == {"status": "draining"}
        assert server.client.get("/live").status_code == 200
        refused = server.client.post(PATH, json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert server.metrics()['trtserve_rejections_total{reason="draining"}'] == 1
        assert finish_of(list(chunks)) == ["length"]
    assert server.wait() == 0
    assert not folder.exists()
    assert server.tree() == []


def test_an_idle_server_ends_at_once(serve):
    server = serve().until_ready()
    server.client.get("/live")  # leaves an idle connection open
    asked_s = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - asked_s < 3, "it does not wait for connections to close"


def test_what_outlasts_the_timeout_is_told(serve):
    server = serve("--shutdown-timeout", "0.5").until_ready()
    with running_stream(server, 1000) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        server.signal(signal.SIGTERM)
        last = list(chunks)[-1]
    assert (last["error"]["code"], last["error"]["type"]) == ("draining", "overloaded_error")
    assert server.wait() == 6
    assert "1 requests are cut off" in server.output


def test_a_second_signal_ends_it_at_once(serve):
    server = serve("--shutdown-timeout", "600").until_ready()
    with running_stream(server, 1000) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        server.signal(signal.SIGTERM)
        eventually(lambda: code_of_new_request(server) == "draining", "draining")
        asked_s = time.monotonic()
        server.signal(signal.SIGTERM)
        assert list(chunks)[-1]["error"]["code"] == "draining"
    assert server.wait() == 6
    assert time.monotonic() - asked_s < 5


def test_clients_that_do_not_read_hold_nothing_up(serve):
    """One of them has a whole stream waiting for it in the server, the other an answer that is still being sent."""
    limits = ("--shutdown-timeout", "0.2", "--max-buffered-kib", "100000")
    server = serve(*limits, num_blocks=512, options=("speedup=50",)).until_ready()
    whole_chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
    streamed = {"prompt": "a", "max_tokens": 4000, "logprobs": 5, "n": 4, "seed": 1, "stream": True}
    with socket.socket() as whole, socket.socket() as stream:
        for connection, path, body in ((whole, "/v1/chat/completions", whole_chat), (stream, PATH, streamed)):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            content = json.dumps(body).encode()
            connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n".encode())
            connection.sendall(content)
        server.until_metric("trtllm_num_requests_running", lambda value: value > 1)
        server.until_metric("trtllm_num_requests_running", lambda value: value == 0, timeout_s=30.0)
        assert server.metric("trtserve_inflight_requests") == 1  # the whole answer, on its way
        asked_s = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 6
        assert time.monotonic() - asked_s < 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_starting(serve, number):
    server = serve(options=("start_s=60",))
    server.until_output("agg-0: simulating")
    asked_s = time.monotonic()
    server.signal(number)
    assert server.wait() == 0
    assert time.monotonic() - asked_s < 5, "the worker ended by itself"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_the_model_is_being_fetched(number, tmp_path):
    """From an index that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "*"}
        here = {"TRTSERVE_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
        with ServerProcess("--engine", "sim", environment=pip | here) as server:
            index.settimeout(20)
            index.accept()[0].close()
            assert len(server.tree()) == 2 and list(tmp_path.glob("models/*.new-*"))
            server.signal(number)
            assert server.wait() == 0
            assert server.tree() == []
    left = {path.suffix for path in tmp_path.rglob("*") if not path.is_dir()}
    assert left <= {".lock"}


def test_with_a_worker_that_hangs(serve):
    options = ("fault_token_id=100", "fault_kind=hang", "fault_after_tokens=3")
    server = serve("--shutdown-timeout", "0.2", options=options).until_ready()
    with server.client.stream("POST", PATH, json={"prompt": [100], "max_tokens": 9, "stream": True}) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        server.signal(signal.SIGTERM)
        assert list(chunks)[-1]["error"]["code"] == "draining"
    assert server.wait() == 6


def test_with_a_worker_that_is_stopped(serve):
    server = serve().until_ready()
    os.kill(server.worker_pids()[0], signal.SIGSTOP)
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_killed_server_takes_its_workers_along(serve, tmp_path):
    # Nobody is left to remove its private folder, so that lies in the test's.
    server = serve("--workers", "2", TMPDIR=str(tmp_path)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    assert len(server.worker_pids()) == 2
    server.signal(signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    eventually(lambda: not server.tree(), "the end of the workers")


def test_logs_stay_where_they_were_asked_for(serve, tmp_path):
    server = serve("--log-dir", str(tmp_path / "logs")).until_ready()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    log = (tmp_path / "logs" / "agg-0.log").read_text()
    assert re.search(r"INFO .*: warming up", log)
