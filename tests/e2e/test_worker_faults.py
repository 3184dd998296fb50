"""Workers that die, crash, hang or fall silent: clients are told at once, and the next request is served."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess
from tests.e2e.sse import events

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 1000}
SHORT = {"prompt": "a", "max_tokens": 3}
FAULT_TOKEN_ID = 100


@pytest.fixture(scope="module")
def victim(serve_module: Serve) -> ServerProcess:
    """A server whose only worker is killed again and again."""
    return serve_module().until_ready()


def ask_in_thread(server: ServerProcess, body: dict) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.client.post(COMPLETIONS, json=body)))
    thread.start()
    return thread, answers


def last_error(server: ServerProcess, body: dict, strike) -> tuple[dict, float]:
    """The error that ends a stream, and how many seconds after `strike` it came."""
    with server.client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        strike()
        struck_s = time.monotonic()
        last = list(chunks)[-1]
    return last["error"], time.monotonic() - struck_s


def until_served_again(server: ServerProcess, restarts: int = 1) -> None:
    server.until_metric("trtserve_worker_restarts_total", lambda value: value >= restarts)
    server.until_metric("trtserve_worker_up", lambda value: value == 1)
    assert server.client.post(COMPLETIONS, json=SHORT).status_code == 200
    server.until_idle(64)


def test_a_killed_worker_ends_streams_with_an_error_event(victim):
    restarts = victim.metric("trtserve_worker_restarts_total")
    (worker,) = victim.worker_pids()
    error, seconds = last_error(victim, LONG, lambda: os.kill(worker, signal.SIGKILL))
    assert (error["code"], error["type"]) == ("worker_lost", "server_error")
    assert "was killed by SIGKILL" in error["message"]
    assert seconds < 8, "its end is noticed, not its silence"
    while victim.client.get("/ready").status_code == 200:
        pass
    refused = victim.client.post(COMPLETIONS, json=SHORT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
    assert int(refused.headers["retry-after"]) >= 1
    assert victim.metrics()['trtserve_rejections_total{reason="no_worker"}'] >= 1
    until_served_again(victim, int(restarts) + 1)


def test_a_killed_worker_fails_whole_answers_with_503(victim):
    restarts = victim.metric("trtserve_worker_restarts_total")
    threads = [ask_in_thread(victim, LONG | {"seed": seed}) for seed in range(3)]
    victim.until_metric("trtllm_num_requests_running", lambda value: value == 3)
    (worker,) = victim.worker_pids()
    os.kill(worker, signal.SIGKILL)
    for thread, answers in threads:
        thread.join(20)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "worker_lost")
    until_served_again(victim, int(restarts) + 1)


def test_pauses_before_restarts_grow(victim):
    restarts = victim.metric("trtserve_worker_restarts_total")
    assert f"restarting in {0.5 * 2 ** min(restarts - 1, 6):.1f} s" in victim.output


def test_one_of_two_workers_dies(serve):
    server = serve("--workers", "2", "--router", "round_robin").until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    threads = [ask_in_thread(server, {"prompt": "a", "max_tokens": 400, "seed": seed}) for seed in range(2)]
    server.until_metric("trtllm_num_requests_running", lambda value: value == 2)
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    for thread, _ in threads:
        thread.join(20)
    assert sorted(answers[0].status_code for _, answers in threads) == [200, 503]
    assert server.client.get("/ready").status_code == 200
    assert [server.client.post(COMPLETIONS, json=SHORT).status_code for _ in range(4)] == [200] * 4
    server.until_idle(128)


@pytest.mark.parametrize("kind", ["crash", "hang"])
def test_an_engine_that_breaks_under_a_request(serve, kind):
    options = (f"fault_token_id={FAULT_TOKEN_ID}", f"fault_kind={kind}", "fault_after_tokens=5")
    server = serve("--worker-stall-timeout", "2", options=options).until_ready()
    error, seconds = last_error(server, {"prompt": [FAULT_TOKEN_ID], "max_tokens": 1000}, lambda: None)
    assert error["code"] == "worker_lost"
    assert ("exit code 70" if kind == "crash" else "made no step for 2 s") in error["message"]
    assert seconds < 10
    until_served_again(server)


@pytest.mark.parametrize("streams", [True, False])
def test_an_engine_that_fails_one_request_serves_the_others(serve, streams):
    options = (f"fault_token_id={FAULT_TOKEN_ID}", "fault_kind=error", "fault_after_tokens=5")
    server = serve(options=options).until_ready()
    other, answers = ask_in_thread(server, {"prompt": "a", "max_tokens": 60})
    body = {"prompt": [FAULT_TOKEN_ID], "max_tokens": 1000}
    if streams:
        error, _ = last_error(server, body, lambda: None)
    else:
        response = server.client.post(COMPLETIONS, json=body)
        assert response.status_code == 500
        error = response.json()["error"]
    assert error["code"] == "engine_error"
    other.join(20)
    assert answers[0].status_code == 200
    assert server.metric("trtserve_worker_restarts_total") == 0
    server.until_idle(64)


def test_a_stopped_worker_is_lost_after_its_silence(serve):
    server = serve("--worker-silence-timeout", "2").until_ready()
    (worker,) = server.worker_pids()
    error, seconds = last_error(server, LONG, lambda: os.kill(worker, signal.SIGSTOP))
    assert error["code"] == "worker_lost"
    assert "no heartbeat for" in error["message"]
    assert seconds < 10
    until_served_again(server)


def test_a_worker_that_is_told_to_end_is_replaced(serve):
    server = serve().until_ready()
    (worker,) = server.worker_pids()
    error, _ = last_error(server, LONG, lambda: os.kill(worker, signal.SIGTERM))
    assert error["code"] == "worker_lost"
    until_served_again(server)


def test_held_requests_wait_for_the_restart(serve):
    server = serve("--max-num-seqs", "1").until_ready()
    running, _ = ask_in_thread(server, LONG)
    server.until_metric("trtllm_num_requests_running", lambda value: value == 1)
    held, answers = ask_in_thread(server, SHORT)
    server.until_metric("trtserve_queued_requests", lambda value: value == 1)
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    running.join(20)
    held.join(20)
    assert answers[0].status_code == 200
    server.until_idle(64)
