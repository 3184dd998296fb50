"""Disaggregated serving through HTTP: real processes, real transfers, the same tokens as one worker gives."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess, eventually
from tests.e2e.sse import stream

PATH = "/v1/completions"
WORKER = re.compile(r"worker=([\w-]+)")


def prompts() -> list[list[int]]:
    """Short, exactly one block, several blocks, partial last blocks, shared beginnings, longer than a pass."""
    shared = [7 + number % 50 for number in range(70)]
    alone = [[100 + size % 300] * size for size in (1, 5, 15, 16, 17, 31, 32, 33, 48, 100, 130, 600)]
    return [*alone, *([*shared, 400 + number] for number in range(4)), *([*shared, *[500 + n] * 40] for n in range(4))]


def answer(client: httpx.Client, prompt: list[int], **fields: object) -> str:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0} | fields
    return client.post(PATH, json=body).raise_for_status().json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def expected(serve_module: Serve) -> dict[int, str]:
    """What one aggregated worker answers."""
    server = serve_module("--max-num-tokens", "256", num_blocks=512, options=("speedup=50",)).until_ready()
    return {number: answer(server.client, prompt) for number, prompt in enumerate(prompts())}


def disagg(serve: Serve, *more: str, prefill: int = 1, decode: int = 1, num_blocks: int = 512) -> ServerProcess:
    flags = ("--mode", "disagg", "--prefill-workers", str(prefill), "--decode-workers", str(decode))
    server = serve(
        *flags, "--max-num-tokens", "256", *more, num_blocks=num_blocks, options=("speedup=50",)
    ).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == prefill + decode)
    return server


def has(transfer: str) -> bool:
    from trtserve.plugins.manager import PluginManager

    return PluginManager().problem("transfer", transfer) is None


@pytest.fixture(params=["shm", "ucx", "nixl"])
def moved(request, serve: Serve) -> Iterator[ServerProcess]:
    """A pair that always hands over, by each transfer. The simulated engine checks every byte that it is given."""
    if not has(request.param):
        pytest.skip(f"{request.param} is not installed")
    yield disagg(serve, "--transfer", request.param, "--disagg-policy", "always")


def test_every_answer_is_the_same_and_every_byte_moved(moved: ServerProcess, expected: dict[int, str]):
    given = {number: answer(moved.client, prompt) for number, prompt in enumerate(prompts())}
    assert given == expected
    now = moved.metrics()
    assert sum(value for name, value in now.items() if name.startswith("trtserve_kv_fetched_bytes_total")) > 30 * 16384
    fetches = {name: value for name, value in now.items() if name.startswith("trtserve_kv_fetches_total")}
    whole_blocks = [prompt for prompt in prompts() if len(prompt) >= 16]
    assert sum(fetches.values()) == len(whole_blocks) and all('outcome="valid"' in name for name in fetches), fetches
    assert not any(value for name, value in now.items() if "transfer_failed" in name)
    moved.until_idle(2 * 512)


async def test_many_at_once_are_the_same_too(serve: Serve, expected: dict[int, str]):
    server = disagg(serve, "--disagg-policy", "always", "--router", "kv", prefill=2, decode=2)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client:

        async def ask(number: int, prompt: list[int]) -> tuple[int, str]:
            body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
            return number, (await client.post(PATH, json=body)).raise_for_status().json()["choices"][0]["text"]

        jobs = [ask(number, prompt) for _ in range(3) for number, prompt in enumerate(prompts())]
        answers = await asyncio.gather(*jobs)
    assert all(text == expected[number] for number, text in answers)
    server.until_idle(4 * 512)


def test_the_first_token_is_the_prefills_and_the_rest_the_decode_workers(serve: Serve):
    server = disagg(serve, "--disagg-policy", "always")
    with server.client.stream(
        "POST", PATH, json={"prompt": [9] * 50, "max_tokens": 5, "stream": True}, headers={"X-Trtserve-Explain": "1"}
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert WORKER.findall(response.headers["x-trtserve-explain"])[0] == "prefill-0"
    assert len(lines) >= 4, "the first token, the others, the end, [DONE]"
    events = stream(
        server.client, PATH, {"prompt": [9] * 50, "max_tokens": 5, "stream_options": {"include_usage": True}}
    )
    usage = next(event["usage"] for event in events if event.get("usage"))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (50, 5)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 48


def test_seeds_penalties_and_logprobs_go_on_where_they_were(serve: Serve):
    one = serve("--max-num-tokens", "256", num_blocks=512, options=("speedup=50",)).until_ready()
    two = disagg(serve, "--disagg-policy", "always")
    body = {
        "prompt": [11] * 40,
        "max_tokens": 8,
        "temperature": 0.9,
        "seed": 5,
        "logprobs": 2,
        "frequency_penalty": 0.5,
    }
    first, second = (server.client.post(PATH, json=body).raise_for_status().json() for server in (one, two))
    assert first["choices"] == second["choices"]


def test_auto_computes_short_prompts_where_they_are_decoded(serve: Serve):
    """The times are given, as what a busy machine measures may be anything."""
    times = ("--pinned-estimates.prefill-ms", "1,0.01,0", "--pinned-estimates.decode-ms", "1,0,0")
    server = disagg(serve, *times)
    body = {"prompt": [9] * 3, "max_tokens": 2}
    response = server.client.post(PATH, json=body, headers={"X-Trtserve-Explain": "1"}).raise_for_status()
    explained = response.headers["x-trtserve-explain"]
    local_ms, remote_ms = (float(value) for value in re.findall(r"(?:local|remote)_ms=([\d.]+)", explained))
    assert local_ms <= remote_ms and "prefill=local / worker=decode-0" in explained
    assert server.metric("trtserve_kv_fetches_total") == 0
    assert server.metrics()['trtserve_mode_events_total{event="local_prefill"}'] == 1


def test_with_little_room_the_beginning_moves_and_the_rest_is_computed(
    serve: Serve, expected: dict[int, str], tmp_path: Path
):
    room = ("--kv-transfer-tokens", "64", "--log-dir", str(tmp_path))
    server = disagg(serve, "--disagg-policy", "always", *room)
    assert {number: answer(server.client, prompt) for number, prompt in enumerate(prompts())} == expected
    (kv,) = (one["kv"] for one in server.client.get("/v1/workers").json()["workers"] if one["role"] == "prefill")
    assert kv["rows"] == 4
    assert server.metrics()['trtserve_kv_fetches_total{lane="memfd",outcome="valid"}'] > 0
    assert "KV of 64 tokens can be handed over at a time" in (tmp_path / "prefill-0.log").read_text()
    server.until_idle(2 * 512)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_is_killed_costs_no_wrong_token(serve: Serve, expected: dict[int, str], role: str):
    server = disagg(serve, "--disagg-policy", "always", prefill=2, decode=2)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=40) as client:

        async def ask(number: int, prompt: list[int]) -> tuple[int, int, str]:
            response = await client.post(PATH, json={"prompt": prompt, "max_tokens": 12, "temperature": 0})
            body = response.json()
            return number, response.status_code, body["choices"][0]["text"] if response.status_code == 200 else ""

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(ask(number, prompt)) for _ in range(4) for number, prompt in enumerate(prompts())
            ]
            await asyncio.to_thread(server.until_metric, "trtserve_kv_fetches_total", lambda value: value > 5)
            os.kill(server.worker_pid(f"{role}-0"), signal.SIGKILL)
        answers = [task.result() for task in tasks]
    assert {status for _, status, _ in answers} <= {200, 503}
    assert all(text == expected[number] for number, status, text in answers if status == 200)
    assert sum(status == 200 for _, status, _ in answers) > len(answers) * 0.9
    server.until_metric("trtserve_worker_up", lambda value: value == 4)
    server.until_idle(4 * 512)


def test_without_its_only_prefill_worker_the_decode_worker_computes_prompts(serve: Serve, expected: dict[int, str]):
    server = disagg(serve, "--disagg-policy", "always")
    os.kill(server.worker_pid("prefill-0"), signal.SIGKILL)
    server.until_metric("trtserve_worker_up", lambda value: value == 1)
    assert [answer(server.client, prompt) for prompt in prompts()[:4]] == [expected[number] for number in range(4)]
    assert server.metrics()['trtserve_mode_events_total{event="prefill_moved_to_decode"}'] > 0
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    server.until_idle(2 * 512)


async def test_clients_that_leave_in_any_phase_leave_nothing(serve: Serve):
    server = disagg(serve, "--disagg-policy", "always", prefill=1, decode=1)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=40) as client:

        async def leave(number: int) -> None:
            body = {"prompt": [20 + number] * (30 + 20 * number), "max_tokens": 200, "stream": True}
            try:
                async with asyncio.timeout(0.002 * number), client.stream("POST", PATH, json=body) as response:
                    async for _ in response.aiter_lines():
                        pass
            except (TimeoutError, httpx.HTTPError):
                pass

        await asyncio.gather(*(leave(number) for number in range(40)))
    server.until_idle(2 * 512)
    state = eventually(
        lambda: (
            not any(
                worker["booked_requests"] or worker["reserved_blocks"]
                for worker in server.client.get("/v1/router/state").json()["workers"]
            )
        ),
        "nothing is booked or promised",
    )
    assert state
