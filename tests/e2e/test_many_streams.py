"""Many streams at once: each client gets its own text, whole and in order."""

from __future__ import annotations

import asyncio

import httpx

from tests.e2e.process import Serve, ServerProcess
from tests.e2e.sse import events, finish_of, text_of

NUM_STREAMS = 40
PATH = "/v1/completions"


def asked(number: int) -> dict:
    """Different lengths of prompts and answers, so that streams come and go all the time."""
    return {"prompt": [10 + number] * (1 + number % 40), "max_tokens": 5 + number % 60}


async def read_stream(client: httpx.AsyncClient, number: int) -> tuple[str, list[str]]:
    async with client.stream("POST", PATH, json=asked(number) | {"stream": True}) as response:
        lines = [line async for line in response.aiter_lines()]
    chunks = list(events(iter(lines)))
    return text_of(chunks), finish_of(chunks)


def check(server: ServerProcess, streams: list[tuple[str, list[str]]]) -> None:
    for number, (text, reasons) in enumerate(streams):
        alone = server.client.post(PATH, json=asked(number)).json()["choices"][0]
        assert (text, reasons) == (alone["text"], ["length"])


async def test_every_stream_is_its_own(serve: Serve):
    """Two workers with room for eight sequences each, and a cache that is too small for all: they queue, and the
    engines preempt."""
    server = serve("--workers", "2", "--max-num-seqs", "8", num_blocks=24, options=("speedup=10",)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, trust_env=False, timeout=30) as client:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read_stream(client, number)) for number in range(NUM_STREAMS)]
    check(server, [task.result() for task in tasks])
    booked = [value for name, value in server.metrics().items() if name.startswith("trtserve_worker_prompt_tokens")]
    assert min(booked) > 0, "one worker had nothing to do"
    server.until_idle(48)


async def test_half_of_them_leave(serve: Serve):
    server = serve("--max-num-seqs", "16", num_blocks=64, options=("speedup=2",)).until_ready()

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        async with client.stream("POST", PATH, json=asked(number) | {"max_tokens": 300, "stream": True}) as response:
            async for _ in response.aiter_lines():
                break

    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, trust_env=False, timeout=30) as client:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read_stream(client, number)) for number in range(NUM_STREAMS // 2)]
            for number in range(NUM_STREAMS // 2):
                group.create_task(leave(client, number))
    check(server, [task.result() for task in tasks])
    server.until_idle(64)
    assert server.metric("trtserve_disconnects_total") == NUM_STREAMS // 2
