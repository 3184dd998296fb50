"""The direct path to the socket, plain ASGI, HTTP/1.0 and HTTP/2 carry the same bytes, and connections live on."""

from __future__ import annotations

import http.client
import json
import re
import socket

import httpx
import pytest
from starlette.applications import Starlette

from tests.e2e.process import ServerProcess
from tests.e2e.sse import events, finish_of, text_of

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "stream": True}
COMPLETION = {"prompt": "Hello", "max_tokens": 40, "stream": True, "stream_options": {"include_usage": True}}
REQUESTS = pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)], ids=["chat", "completions"]
)
SAME_ID = {"x-request-id": "the-same"}


def normalised(body: bytes) -> tuple[list[bytes], str]:
    """What must be the same: the envelopes, with the time of the answer and how the text was cut into events left
    out, and the text."""
    chunks = list(events(iter(body.decode().splitlines())))
    text = text_of(chunks)
    timeless = re.sub(rb'"created":\d+', b'"created":0', body)
    parts = re.sub(rb'("content"|"text"):"(?:[^"\\]|\\.)*"', rb"\1:_", timeless).split(b"\n\n")
    return list(dict.fromkeys(parts)), text


def raw_request(version: str, path: str, body: dict, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "host: x", f"content-length: {len(content)}", *headers]
    return "\r\n".join([*lines, "x-request-id: the-same", "", ""]).encode() + content


@pytest.fixture
def connection(server: ServerProcess):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        yield opened


@REQUESTS
def test_http_1_0_gives_the_same_body_and_closes(server, connection, path, body):
    direct = server.client.post(path, json=body, headers=SAME_ID)
    assert direct.headers["transfer-encoding"] == "chunked"
    connection.sendall(raw_request("1.0", path, body))
    head, _, content = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"chunked" not in head
    assert normalised(content) == normalised(direct.content)
    shared = {"content-type", "cache-control", "x-accel-buffering", "x-request-id"}
    plain = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    assert {name: plain[name] for name in shared} == {name: direct.headers[name] for name in shared}


@REQUESTS
def test_http_2_gives_the_same_body(server, path, body):
    direct = server.client.post(path, json=body, headers=SAME_ID)
    with httpx.Client(http1=False, http2=True, base_url=server.url, trust_env=False, timeout=20) as client:
        answer = client.post(path, json=body, headers=SAME_ID)
        assert answer.http_version == "HTTP/2"
        assert normalised(answer.content) == normalised(direct.content)
        assert client.post(path, json=body | {"stream": False, "stream_options": None}).status_code == 200
    server.until_idle(64)


def test_a_stream_over_http_2_can_be_left(server):
    before = server.metric("trtserve_disconnects_total")
    with httpx.Client(http1=False, http2=True, base_url=server.url, trust_env=False, timeout=20) as client:
        with client.stream("POST", "/v1/completions", json=COMPLETION | {"max_tokens": 1000}) as answer:
            next(answer.iter_lines())
        assert client.get("/live").status_code == 200
    server.until_idle(64)
    assert server.metric("trtserve_disconnects_total") == before + 1


def read_answer(connection: socket.socket) -> bytes:
    """One whole answer's body; leaves the connection open."""
    with http.client.HTTPResponse(connection) as response:
        response.begin()
        assert response.status == 200
        return response.read()


def test_many_answers_on_one_connection(server, connection):
    for turn in range(5):
        connection.sendall(raw_request("1.1", "/v1/chat/completions", CHAT | {"max_tokens": turn + 1}))
        assert finish_of(list(events(iter(read_answer(connection).decode().splitlines())))) == ["length"]
        connection.sendall(raw_request("1.1", "/v1/completions", {"prompt": "a", "max_tokens": 1}))
        assert json.loads(read_answer(connection))["object"] == "text_completion"
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert json.loads(read_answer(connection)) == {"status": "live"}


def test_the_next_request_may_be_sent_before_the_answer(server, connection):
    """Pipelined: the second answer follows the first one's end."""
    connection.sendall(raw_request("1.1", "/v1/completions", COMPLETION))
    connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    both = b"".join(iter(lambda: connection.recv(65536), b""))
    assert both.count(b"HTTP/1.1 200") == 2
    first, second = both.split(b"0\r\n\r\n")
    assert first.endswith(b"data: [DONE]\n\n\r\n")
    assert second.endswith(b'{"status":"live"}')


def test_a_client_that_asks_to_close_is_obeyed(server, connection):
    connection.sendall(raw_request("1.1", "/v1/completions", COMPLETION, "connection: close"))
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.endswith(b"0\r\n\r\n")


def test_a_client_that_waits_for_100_continue(server, connection):
    request = raw_request("1.1", "/v1/completions", {"prompt": "a", "max_tokens": 1}, "expect: 100-continue")
    head, _, content = request.partition(b"\r\n\r\n")
    connection.sendall(head + b"\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 100")
    connection.sendall(content)
    assert json.loads(read_answer(connection))["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /live HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 70_000 + b"\r\n\r\n",
    ],
    ids=["nonsense", "no-host", "long-head"],
)
def test_what_is_no_request_gets_a_4xx_and_hurts_nobody(server, connection, request_bytes):
    connection.sendall(request_bytes)
    assert re.match(rb"HTTP/1.1 4\d\d", connection.recv(4096))
    assert server.client.get("/live").status_code == 200


def test_plain_asgi_is_another_way_to_the_same_application():
    """A server that is not hypercorn has no path to its transport."""
    from trtserve.server.api.hypercorn_path import find_path
    from trtserve.server.api.stream import AsgiStream, open_stream

    async def send(message: dict) -> None:
        raise AssertionError("nothing is sent before the first write")

    assert find_path(send) is None
    assert find_path(Starlette().__call__) is None
    assert isinstance(open_stream(send, [], lambda: None, 1), AsgiStream)
