"""The torch engine with the default model in float32: disaggregated servers give one worker's tokens, over each
transfer, with real processes and every block really moved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.e2e.process import ServerProcess
from trtserve.plugins.manager import PluginManager

pytestmark = pytest.mark.timeout(120)

PATH = "/v1/completions"
BLOCK = 16
MAX_TOKENS = 8
TEXT = (
    "The river rises in the hills, runs past three old mills and a bridge of stone, and comes to the sea where the "
    "town has its harbour. Boats leave before dawn and return at noon with whatever the nets have caught. "
)


def prompts() -> list[str]:
    """Of a word, a block, several blocks, partial last blocks, with shared beginnings, longer than a pass."""
    lengths = [3, 20, 55, 70, 80, 90, 120, 160, 200, 300, 450, 900]
    alone = [f"{number}. {(TEXT * 5)[number * 7 :]}"[:length] for number, length in enumerate(lengths)]
    questions = ("Who", "What is the", "How many mills", "Where does the river")
    nouns = ("river", "town", "bridge", "fisherman")
    return [*alone, *(TEXT + question for question in questions), *(f"{TEXT}{TEXT}Then the {noun}" for noun in nouns)]


async def answers(url: str) -> list[str]:
    """All at once."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=90) as client:

        async def ask(prompt: str) -> str:
            body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            return (await client.post(PATH, json=body)).raise_for_status().json()["choices"][0]["text"]

        return await asyncio.gather(*map(ask, prompts()))


@pytest.fixture(scope="module")
def serve_torch() -> Iterator:
    """Starts servers that end with the module."""
    with ExitStack() as stack:

        def serve(*flags: str) -> ServerProcess:
            common = ("--dtype", "float32", "--num-blocks", "256", "--max-num-tokens", "128", "--warm-up-timeout", "0")
            server = stack.enter_context(ServerProcess(*common, "--engine-option", "num_threads=1", *flags))
            server.until_output("curl -N", 90)
            server.client.base_url = httpx.URL(server.url)
            return server

        yield serve


@pytest.fixture(scope="module")
def expected(serve_torch) -> list[str]:
    return asyncio.run(answers(serve_torch().url))


@pytest.mark.parametrize("transfer", ["shm", "ucx", "nixl"])
def test_the_same_tokens_and_every_block_moved(serve_torch, expected, transfer: str):
    if PluginManager().problem("transfer", transfer) is not None:
        pytest.skip(f"{transfer} is not installed")
    server = serve_torch("--mode", "disagg", "--disagg-policy", "always", "--transfer", transfer)
    server.until_metric("trtserve_worker_up", lambda value: value == 2, timeout_s=60)
    assert asyncio.run(answers(server.url)) == expected
    now = server.metrics()
    fetches = {name: value for name, value in now.items() if name.startswith("trtserve_kv_fetches_total")}
    failed = sum(value for name, value in fetches.items() if 'outcome="valid"' not in name)
    assert sum(fetches.values()) - failed >= 10, fetches
    workers = server.client.get("/v1/workers").json()["workers"]
    different = {tuple(ids[: end + BLOCK]) for ids in tokens(server) for end in range(0, len(ids) - BLOCK, BLOCK)}
    fetched = sum(value for name, value in now.items() if name.startswith("trtserve_kv_fetched_bytes_total"))
    # On a machine that stalls for seconds a read may pass its deadline; what did not come is computed then.
    wanted = 1 if failed else len(different) * workers[0]["kv"]["row_bytes"]
    assert fetched >= wanted, "every block that was not there came over"
    server.until_idle(2 * 256)


def tokens(server: ServerProcess) -> list[list[int]]:
    asked = ({"prompt": prompt, "add_special_tokens": True} for prompt in prompts())
    return [server.client.post("/tokenize", json=body).raise_for_status().json()["tokens"] for body in asked]
