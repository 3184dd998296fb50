"""Clients that leave in every phase, or do not read: afterwards nothing is booked, queued, running or held."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable

import pytest

from tests.e2e.process import Serve, ServerProcess, eventually
from tests.e2e.sse import events

NUM_BLOCKS = 512
PATH = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 4000}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def narrow(serve_module: Serve) -> ServerProcess:
    """One sequence at a time, and prefills of ten tokens a pass, each of 20 ms."""
    arguments = ("--max-num-seqs", "1", "--max-num-tokens", "10", "--max-buffered-kib", "64")
    return serve_module(*arguments, num_blocks=NUM_BLOCKS, options=("prefill_constant_ms=20",)).until_ready()


@pytest.fixture
def freed(narrow: ServerProcess) -> Callable[[str], None]:
    """Wait until one sequence more has been given back in that phase."""
    name = "trtserve_cancel_to_free_seconds_count"
    before = narrow.metrics()

    def wait(phase: str) -> None:
        sample = f'{name}{{phase="{phase}"}}'
        eventually(lambda: narrow.metrics()[sample] == before[sample] + 1, sample)

    return wait


@pytest.fixture(autouse=True)
def _all_is_given_back_and_counted(request: pytest.FixtureRequest, narrow: ServerProcess):
    before = narrow.metric("trtserve_disconnects_total")
    yield
    if "serve" in request.fixturenames:
        return  # it has a server of its own
    narrow.until_idle(NUM_BLOCKS)
    assert narrow.metric("trtserve_disconnects_total") == before + 1
    assert narrow.client.post(PATH, json={"prompt": "b", "max_tokens": 2}).status_code == 200


def head(server: ServerProcess, length: int, path: str = PATH) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: {server.url}\r\ncontent-length: {length}\r\n\r\n".encode()


def send(server: ServerProcess, body: dict) -> socket.socket:
    """A connection that has sent a request and has read nothing."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head(server, len(content)) + content)
    return connection


@pytest.mark.parametrize("streams", [True, False])
def test_while_queued(narrow, streams, freed):
    with narrow.client.stream("POST", PATH, json=LONG | {"stream": True}) as running:
        chunks = events(running.iter_lines())
        next(chunks)
        with send(narrow, LONG | {"stream": streams}):
            narrow.until_metric("trtserve_queued_requests", lambda value: value == 1)
        narrow.until_metric("trtserve_queued_requests", lambda value: value == 0)
        assert narrow.metric("trtserve_inflight_requests") == 1
        freed("queued")
        narrow.client.delete(f"/v1/requests/{running.headers['x-request-id']}")
        assert list(chunks)[-1]["error"]["code"] == "request_cancelled"


@pytest.mark.parametrize("streams", [True, False])
def test_in_prefill(narrow, streams, freed):
    with send(narrow, {"prompt": [7] * 3900, "max_tokens": 1, "stream": streams}):
        narrow.until_metric("trtllm_num_requests_running", lambda value: value == 1)
    narrow.until_metric("trtllm_num_requests_running", lambda value: value == 0, timeout_s=6.0)
    freed("prefill")


@pytest.mark.parametrize("streams", [True, False])
def test_in_decode(narrow, streams, freed):
    before = narrow.metric("trtserve_worker_generation_tokens_total")
    with send(narrow, LONG | {"stream": streams}):
        narrow.until_metric("trtserve_worker_generation_tokens_total", lambda value: value > before + 5)
    narrow.until_metric("trtllm_num_requests_running", lambda value: value == 0, timeout_s=6.0)
    freed("decode")


def test_after_the_first_event(narrow):
    with send(narrow, LONG | {"stream": True}) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_with_a_reset(narrow):
    with send(narrow, LONG | {"stream": True}) as connection:
        connection.recv(4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_with_several_choices(narrow):
    with send(narrow, LONG | {"n": 4, "stream": True}):
        narrow.until_metric("trtserve_queued_requests", lambda value: value == 3)


def test_while_sending_its_body(narrow):
    with socket.create_connection(("127.0.0.1", narrow.port)) as connection:
        connection.sendall(head(narrow, 100) + b'{"prompt": ')
        narrow.until_metric("trtserve_inflight_requests", lambda value: value == 1)


def test_one_that_does_not_read_is_cut_off(serve):
    """Fast passes, and 20 log probabilities a token make 4,000 tokens more than any socket buffer holds."""
    server = serve("--max-buffered-kib", "64", num_blocks=NUM_BLOCKS, options=("speedup=20",)).until_ready()
    content = json.dumps({"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as slow, send(server, {"prompt": "b", "max_tokens": 4000, "stream": True}) as other:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head(server, len(content), "/v1/chat/completions") + content)
        server.until_metric("trtserve_disconnects_total", lambda value: value == 1, timeout_s=20.0)
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += other.recv(65536)
        said = "".join(json.loads(event)["choices"][0]["text"] for event in re.findall(rb"data: ({.*})\n", answer))
        assert said == server.client.post(PATH, json={"prompt": "b", "max_tokens": 4000}).json()["choices"][0]["text"]
        received = b"".join(iter(lambda: slow.recv(65536), b""))
        assert not received.endswith(b"0\r\n\r\n"), "what was cut off must not look complete"
    server.until_idle(NUM_BLOCKS)


def test_between_prefill_and_decode(serve):
    """The decode worker takes one sequence and has one, so the next one's hand-over waits after its first token."""
    flags = ("--mode", "disagg", "--disagg-policy", "always", "--max-num-seqs", "1")
    server = serve(*flags, num_blocks=NUM_BLOCKS).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    with server.client.stream("POST", PATH, json=LONG | {"stream": True}) as running:
        chunks = events(running.iter_lines())
        next(chunks)
        server.until_metric("trtserve_worker_generation_tokens_total", lambda value: value > 3)
        with send(server, LONG | {"stream": True, "prompt": [9] * 40}) as connection:
            assert b"data:" in connection.recv(4096)
            server.until_metric("trtserve_queued_requests", lambda value: value == 1)
        freed = 'trtserve_cancel_to_free_seconds_count{phase="hand_over"}'
        eventually(lambda: server.metrics()[freed] == 1, freed)
        workers = server.client.get("/v1/workers").json()["workers"]
        assert sorted(worker["booked_sequences"] for worker in workers) == [0, 1]
        server.client.delete(f"/v1/requests/{running.headers['x-request-id']}")
        assert list(chunks)[-1]["error"]["code"] == "request_cancelled"
    server.until_idle(2 * NUM_BLOCKS)
    eventually(
        lambda: (
            not any(worker["kv"]["usage"]["leases"] for worker in server.client.get("/v1/workers").json()["workers"])
        ),
        "no lease is left",
    )
