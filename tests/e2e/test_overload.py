"""More requests than the server takes, and answers that take too long."""

from __future__ import annotations

import socket
import threading

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess
from tests.e2e.sse import events

PATH = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 100}


@pytest.fixture(scope="module")
def hasty(serve_module: Serve) -> ServerProcess:
    """Answers must be there in 0.4 s, which is enough for some twenty tokens."""
    return serve_module("--request-timeout", "0.4", "--max-num-seqs", "1", "--max-queued-tokens", "100").until_ready()


def ask_in_threads(server: ServerProcess, count: int) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda seed=seed: answers.append(server.client.post(PATH, json=LONG | {"seed": seed})))
        for seed in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, answers


def test_a_full_queue(serve):
    server = serve("--max-num-seqs", "1", "--max-queued-requests", "2").until_ready()
    threads, answers = ask_in_threads(server, 3)
    server.until_metric("trtserve_queued_requests", lambda value: value == 2)
    refused = server.client.post(PATH, json=LONG | {"stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert int(refused.headers["retry-after-ms"]) >= 1
    assert "2 requests" in refused.json()["error"]["message"]
    for thread in threads:
        thread.join(40)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert server.metrics()['trtserve_rejections_total{reason="queue_full"}'] == 1
    server.until_idle(64)


def test_a_queue_full_of_tokens(hasty):
    ask_in_threads(hasty, 1)
    hasty.until_metric("trtllm_num_requests_running", lambda value: value == 1)
    refused = hasty.client.post(PATH, json={"prompt": "a" * 101, "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    hasty.until_idle(64)


def test_no_queue_at_all_still_serves(serve):
    server = serve("--max-num-seqs", "1", "--max-queued-requests", "0").until_ready()
    assert server.client.post(PATH, json=LONG | {"max_tokens": 2}).status_code == 200
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
    threads, answers = ask_in_threads(hasty, 2)
    for thread in threads:
        thread.join(5)
    assert [answer.status_code for answer in answers] == [504, 504]
    hasty.until_idle(64)


def test_a_body_that_never_ends_takes_too_long(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.sendall(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{{".encode())
        connection.settimeout(5)
        assert connection.recv(4096).startswith(b"HTTP/1.1 504")
    hasty.until_idle(64)
