"""A whole server on one GPU: the same tokens disaggregated as aggregated, over every transfer that moves GPU memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ServerProcess
from trtserve.plugins.manager import PluginManager

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

BLOCK = 16
PATH = "/v1/completions"


def prompts() -> list[list[int]]:
    """Short, exactly one block, several blocks, partial last blocks, shared beginnings, longer than a pass."""
    shared = [7 + number % 50 for number in range(70)]
    alone = [[100 + (size * number) % 300 for number in range(size)] for size in (1, 5, 15, 16, 17, 31, 32, 33, 100)]
    long = [[3 + number * number % 900 for number in range(size)] for size in (600, 1100, 2500)]
    beginnings = [[*shared, 400 + number] for number in range(4)] + [[*shared, *[500 + n] * 40] for n in range(4)]
    return [*alone, *long, *beginnings]


def arguments(model: Path, *more: str) -> list[str]:
    return [str(model), "--device", "cuda", "--dtype", "float32", "--num-blocks", "2048", *more]


async def answers(url: str) -> list[str]:
    """All at once, twice: computed, and from the prefix cache."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as client:

        async def ask(prompt: list[int]) -> str:
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            return (await client.post(PATH, json=body)).raise_for_status().json()["choices"][0]["text"]

        first = await asyncio.gather(*map(ask, prompts()))
        assert await asyncio.gather(*map(ask, prompts())) == first
        return first


@pytest.fixture(scope="module")
def expected(device, random_llama: Path) -> list[str]:
    with ServerProcess(*arguments(random_llama)) as server:
        server.until_output("curl -N", 120)
        return asyncio.run(answers(server.url))


@pytest.fixture(params=["cupy_ipc", "ucx", "nixl"])
def disaggregated(request, device, random_llama: Path) -> Iterator[ServerProcess]:
    problem = PluginManager().problem("transfer", request.param)
    if problem is not None:
        pytest.skip(problem)
    flags = ("--mode", "disagg", "--disagg-policy", "always", "--transfer", request.param)
    with ServerProcess(*arguments(random_llama, *flags)) as server:
        server.until_output("curl -N", 120)
        server.client.base_url = httpx.URL(server.url)
        yield server


def test_every_answer_is_the_same_and_every_byte_moved(disaggregated: ServerProcess, expected: list[str]):
    assert asyncio.run(answers(disaggregated.url)) == expected
    now = disaggregated.metrics()
    fetches = {name: value for name, value in now.items() if name.startswith("trtserve_kv_fetches_total")}
    assert sum(value for name, value in fetches.items() if 'outcome="valid"' in name) >= 20, fetches
    assert not any('outcome="valid"' not in name and value for name, value in fetches.items()), fetches
    moved = sum(value for name, value in now.items() if name.startswith("trtserve_kv_fetched_bytes_total"))
    row_bytes = BLOCK * 6 * 2 * 4 * 64 * 4
    different = {tuple(prompt[: end + BLOCK]) for prompt in prompts() for end in range(0, len(prompt) - BLOCK, BLOCK)}
    assert moved >= len(different) * row_bytes, "every block that the decode worker did not have came over"
