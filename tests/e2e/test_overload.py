"""More requests than the server takes, and answers that take too long."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess
from tests.e2e.sse import events

PATH = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 1000}
SHORT = {"prompt": "a", "max_tokens": 2}


@pytest.fixture(scope="module")
def hasty(serve_module: Serve) -> ServerProcess:
    """Answers must be there in a second, which is enough for some hundred tokens."""
    return serve_module("--request-timeout", "1", "--max-num-seqs", "1").until_ready()


@pytest.fixture(scope="module")
def narrow(serve_module: Serve) -> ServerProcess:
    """One sequence at a time, and little that may wait for it."""
    limits = ("--max-num-seqs", "1", "--max-queued-requests", "2", "--max-queued-tokens", "100")
    return serve_module(*limits).until_ready()


@contextmanager
def taken(server: ServerProcess) -> Iterator[None]:
    """Its only place is taken for the length of the block."""
    with server.client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        yield
        server.client.delete(f"/v1/requests/{response.headers['x-request-id']}")
        assert list(chunks)[-1]["error"]["code"] == "request_cancelled"


def ask_in_threads(
    server: ServerProcess, count: int, body: dict
) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda seed=seed: answers.append(server.client.post(PATH, json=body | {"seed": seed})))
        for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, answers


def test_a_full_queue(narrow):
    with taken(narrow):
        threads, answers = ask_in_threads(narrow, 2, SHORT)
        narrow.until_metric("trtserve_queued_requests", lambda value: value == 2)
        refused = narrow.client.post(PATH, json=LONG | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert "2 requests" in refused.json()["error"]["message"]
    for thread in threads:
        thread.join(40)
    assert [answer.status_code for answer in answers] == [200] * 2
    assert narrow.metrics()['trtserve_rejections_total{reason="queue_full"}'] == 1
    narrow.until_idle(64)


def test_a_queue_full_of_tokens(narrow):
    with taken(narrow):
        refused = narrow.client.post(PATH, json={"prompt": "a" * 101, "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    narrow.until_idle(64)


def test_no_queue_at_all_still_serves(serve):
    server = serve("--max-num-seqs", "1", "--max-queued-requests", "0").until_ready()
    assert server.client.post(PATH, json=SHORT).status_code == 200
    server.until_idle(64)


def test_a_whole_answer_that_takes_too_long(hasty):
    response = hasty.client.post(PATH, json=LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert "--request-timeout" in response.json()["error"]["message"]
    hasty.until_idle(64)


def test_a_stream_that_takes_too_long(hasty):
    with hasty.client.stream("POST", PATH, json=LONG | {"stream": True}) as response:
        assert response.status_code == 200
        last = list(events(response.iter_lines()))[-1]
    assert last["error"]["code"] == "request_timeout"
    hasty.until_idle(64)


def test_the_time_in_the_queue_counts(hasty):
    threads, answers = ask_in_threads(hasty, 2, LONG)
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [504, 504]
    hasty.until_idle(64)


def test_a_body_that_never_ends_takes_too_long(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{".encode())
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 504")
    hasty.until_idle(64)
