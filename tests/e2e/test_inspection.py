"""The routes beside generation: models, tokens, health, metrics, keys, errors of the protocol, cancelling by id."""

from __future__ import annotations

import http.client
import re
import socket
import threading

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess
from tests.e2e.sse import events

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 1000}


@pytest.fixture(scope="module")
def limited(serve_module: Serve, tmp_path_factory) -> ServerProcess:
    """Slow, with keys and a small limit for bodies."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# ours\nfirst-key\n\n  second-key  \n")
    server = serve_module("--api-key-file", str(keys), "--max-body-mib", "0.01", TRTSERVE_API_KEY="third-key")
    server.client.headers["authorization"] = "Bearer first-key"
    return server.until_ready()


def test_models(server):
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["max_model_len"]) for model in listed["data"]] == [("sim", 1024)]
    assert server.client.get("/v1/models/sim").json() == listed["data"][0]
    missing = server.client.get("/v1/models/some/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens_and_back(server, prefix):
    answer = server.client.post(f"{prefix}/tokenize", json={"prompt": "Hé", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 3
    assert answer["token_strs"][0] == "H"
    back = server.client.post(f"{prefix}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "Hé"}


def test_messages_are_tokenized_as_chat_sees_them(server):
    messages = [{"role": "user", "content": "Hello"}]
    count = server.client.post("/tokenize", json={"messages": messages}).json()["count"]
    chat = server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == count


def test_version_and_openapi(server):
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", server.client.get("/version").json()["version"])
    document = server.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    for path, methods in document["paths"].items():
        if "get" in methods and "{" not in path:
            assert server.client.get(path).status_code == 200, path


@pytest.mark.parametrize("path", ["/live", "/healthz", "/ready", "/readyz", "/health"])
def test_health(server, path):
    response = server.client.get(path)
    assert response.status_code == 200
    assert response.json()["status"] in ("live", "ready")


def test_metrics_under_both_paths(server):
    for path in ("/metrics", "/prometheus/metrics"):
        response = server.client.get(path)
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        gauges = [line for line in response.text.splitlines() if line.startswith("trtllm_")]
        assert {line.split(" ")[0] for line in gauges} == {
            "trtllm_num_requests_running",
            "trtllm_num_requests_waiting",
            "trtllm_kv_cache_utilization",
            "trtllm_kv_cache_tokens_per_block",
            "trtllm_kv_cache_max_blocks",
        }
        assert len(gauges) == 5
    assert server.metric("trtllm_kv_cache_max_blocks") == 64
    assert server.metric("trtllm_kv_cache_tokens_per_block") == 16


def test_metrics_count_what_was_served(server):
    before = server.metrics()
    server.client.post(COMPLETIONS, json={"prompt": [5, 6, 7], "max_tokens": 4}).raise_for_status()
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['trtserve_requests_total{endpoint="completions",status="200"}'] == 1
    assert grown['trtserve_sequences_finished_total{finish_reason="length"}'] == 1
    assert grown["trtserve_prompt_tokens_total"] == 3
    assert grown["trtserve_generation_tokens_total"] == 4
    assert grown["trtserve_time_to_first_token_seconds_count"] == 1
    assert grown['trtserve_worker_generation_tokens_total{role="agg",worker="agg-0"}'] == 4


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", path) for path in ("/live", "/ready", "/health", "/version", "/metrics", "/openapi.json")],
        *[("GET", "/v1/models"), ("GET", "/v1/workers"), ("POST", "/tokenize"), ("HEAD", "/v1/models/sim")],
    ],
)
def test_every_answer_carries_the_requests_id(server, method, path):
    content = b'{"prompt": "a"}' if method == "POST" else None
    response = server.client.request(method, path, content=content, headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (200, "mine")
    assert len(server.client.request(method, path, content=content).headers["x-request-id"]) == 32


def test_no_such_path(server):
    response = server.client.get("/v1/nothing", headers={"x-request-id": "mine"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    assert response.headers["x-request-id"] == "mine"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("GET", "/tokenize", "POST"),
        ("GET", "/v1/requests/x", "DELETE"),
    ],
)
def test_no_such_method(server, method, path, allowed):
    response = server.client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert allowed in response.headers["allow"]


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large(limited, path, is_announced):
    body = b'{"prompt": "' + b"a" * 20_000 + b'"}'
    content = body if is_announced else iter([body[:5000], body[5000:]])
    response = limited.client.post(path, content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert "--max-body-mib" in response.json()["error"]["message"]
    assert limited.client.get("/live").status_code == 200


def test_a_body_far_too_large_is_cut_off(limited):
    with pytest.raises(httpx.TransportError):
        limited.client.post(COMPLETIONS, content=(b"a" * 10_000 for _ in range(1000)))
    limited.until_metric("trtserve_inflight_requests", lambda value: value == 0)


@pytest.mark.parametrize("key", ["Bearer first-key", "bearer second-key", "Bearer third-key"])
def test_good_keys(limited, key):
    assert limited.client.get("/v1/models", headers={"authorization": key}).status_code == 200


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", "Basic first-key", "Bearer # ours", "first-key"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", "/v1/models"), ("POST", COMPLETIONS), ("POST", "/tokenize"), ("DELETE", "/v1/requests/x")],
        *[("GET", "/v1/workers"), ("POST", "/v1/workers/agg-0/role")],
    ],
)
def test_bad_keys(limited, method, path, key):
    response = limited.client.request(method, path, headers={"authorization": key})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/live", "/ready", "/health", "/metrics", "/version", "/openapi.json"])
def test_what_needs_no_key(limited, path):
    assert limited.client.get(path, headers={"authorization": ""}).status_code == 200


def test_an_empty_key_file_does_not_open_the_server(serve, tmp_path):
    (tmp_path / "keys").write_text("# none\n")
    server = serve("--api-key-file", str(tmp_path / "keys"))
    assert server.wait() == 2
    assert "holds no key" in server.output


def test_cancelling_a_stream_by_its_id(limited):
    headers = {"x-request-id": "stream-1"}
    with limited.client.stream("POST", COMPLETIONS, json=LONG | {"stream": True}, headers=headers) as response:
        chunks = events(response.iter_lines())
        next(chunks)
        cancelled = limited.client.delete("/v1/requests/cmpl-stream-1")
        assert cancelled.json() == {"id": "cmpl-stream-1", "object": "request", "cancelled": True}
        last = list(chunks)[-1]
    assert last["error"]["code"] == "request_cancelled"
    limited.until_idle(64)
    gone = limited.client.delete("/v1/requests/stream-1")
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "request_id")


def test_cancelling_a_whole_answer_by_its_id(limited):
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(limited.client.post(COMPLETIONS, json=LONG, headers={"x-request-id": "whole-1"}))

    asking = threading.Thread(target=ask)
    asking.start()
    limited.until_metric("trtllm_num_requests_running", lambda value: value == 1)
    assert limited.client.delete("/v1/requests/whole-1").status_code == 200
    asking.join(10)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (499, "request_cancelled")
    limited.until_idle(64)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", COMPLETIONS, 401), ("POST", "/tokenize", 401), ("PUT", COMPLETIONS, 405), ("POST", "/nothing", 404)],
)
def test_a_connection_outlives_an_error_before_its_body(limited, method, path, status):
    """The body comes after the answer could be given; the next request still finds the connection open."""
    with socket.create_connection(("127.0.0.1", limited.port)) as connection:
        connection.settimeout(5)
        connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n".encode())
        for _ in range(5):
            limited.client.get("/live")
            connection.sendall(b"a" * 1000)
        assert status_of(connection) == status
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status_of(connection) == 200


def status_of(connection: socket.socket) -> int:
    """Reads one whole answer."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        response.read()
        return response.status
