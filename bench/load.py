"""A small load generator for streamed chat completions on this machine: keep-alive connections, one request each.

Reads as little of the answers as it can, so that it costs less than what it measures. Used by `bench/server.py`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

WORDS = (
    "time year people way day thing world school state family group country problem hand part place case week company "
    "system program question work number night point home water room mother area money story fact month right study "
    "book eye job word business issue side kind head house service friend father power hour game line end member law"
).split()

_END_OF_BODY = b"0\r\n\r\n"


@dataclass(slots=True)
class Result:
    """What a run saw."""

    seconds: float = 0.0
    failed: int = 0
    first_event_s: list[float] = field(default_factory=list)  # per request, from sending to the first bytes of events


def request_bytes(number: int, input_words: int, output_tokens: int, host: str) -> bytes:
    """A request whose prompt is its own: the words are drawn with `number` as the seed."""
    prompt = " ".join(random.Random(number).choices(WORDS, k=input_words))
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._tail = b""
        self._saw_event = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        tail = self._tail + data
        if not self._saw_event and b"data: " in tail:
            self._saw_event = True
            self._result.first_event_s.append(time.perf_counter() - self._sent_s)
        self._tail = tail[-64:]
        if self._tail.endswith(_END_OF_BODY):
            if b"[DONE]" not in self._tail:
                self._result.failed += 1
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._result.failed += 1
            self._done.set_result(None)

    async def ask(self, request: bytes, result: Result) -> None:
        self._tail, self._saw_event, self._result = b"", False, result
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent_s = time.perf_counter()
        self._transport.write(request)  # type: ignore[attr-defined]  # a stream's transport can write
        await self._done


async def run_load(port: int, requests: list[bytes], concurrency: int) -> Result:
    """Send all requests over `concurrency` connections, each one its next when the answer before it has ended."""
    loop, result, pending = asyncio.get_running_loop(), Result(), iter(requests)

    async def client() -> None:
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
        for request in pending:
            await connection.ask(request, result)

    started_s = time.perf_counter()
    async with asyncio.timeout(600), asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    result.seconds = time.perf_counter() - started_s
    return result
