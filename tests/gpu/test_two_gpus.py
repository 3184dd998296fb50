"""Workers on GPUs of their own (`--gpus`): KV crosses between the devices, roles change, and workers die meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import ServerProcess
from tests.gpu.test_server import PATH, answers, prompts
from trtserve.plugins.transfer import cuda_driver
from trtserve.plugins.transfer_api import TransferError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", autouse=True)
def second_device(device) -> str:
    try:
        cuda_driver.device_uuid("cuda:1")
    except TransferError as error:
        pytest.skip(f"one GPU only: {error}")
    return "cuda:1"


def arguments(model: Path, *more: str) -> list[str]:
    """Without a size for the KV cache: it takes what the GPU has left beside the rows for transfers."""
    return [str(model), "--device", "cuda", "--dtype", "float32", *more]


@pytest.fixture(scope="module")
def expected(random_llama: Path) -> list[str]:
    with ServerProcess(*arguments(random_llama, "--gpus", "1")) as server:
        server.until_output("curl -N", 120)
        return asyncio.run(answers(server.url))


@pytest.fixture
def pair(random_llama: Path) -> Iterator[ServerProcess]:
    flags = ("--mode", "disagg", "--disagg-policy", "always", "--transfer", "cupy_ipc", "--gpus", "0,1")
    with ServerProcess(*arguments(random_llama, *flags)) as server:
        server.until_output("curl -N", 180)
        server.client.base_url = httpx.URL(server.url)
        yield server


def test_kv_crosses_between_two_gpus(pair: ServerProcess, expected: list[str]):
    assert asyncio.run(answers(pair.url)) == expected
    fetches = {name: count for name, count in pair.metrics().items() if name.startswith("trtserve_kv_fetches_total")}
    assert sum(count for name, count in fetches.items() if 'outcome="valid"' in name) >= 20, fetches
    assert not any('outcome="valid"' not in name and count for name, count in fetches.items()), fetches
    free = pair.metric("trtserve_worker_free_blocks")
    pair.until_idle(int(free))


def test_the_roles_of_two_gpus_change_places(pair: ServerProcess, expected: list[str]):
    for first, second in (("decode", "prefill"), ("prefill", "decode")):
        for worker, role in (("prefill-0", first), ("decode-0", second)):
            body = {"role": role, "force": True}
            changed = pair.client.post(f"/v1/workers/{worker}/role", json=body, timeout=60)
            assert changed.status_code == 200, changed.text
        assert asyncio.run(answers(pair.url)) == expected


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_worker_is_killed_while_its_gpu_is_read(pair: ServerProcess, expected: list[str], victim: str):
    pid = pair.worker_pid(victim)

    async def load() -> list[str | int]:
        async with httpx.AsyncClient(base_url=pair.url, trust_env=False, timeout=120) as client:

            async def ask(prompt: list[int]) -> str | int:
                body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
                response = await client.post(PATH, json=body)
                return response.json()["choices"][0]["text"] if response.status_code == 200 else response.status_code

            asked = [asyncio.create_task(ask(prompt)) for prompt in prompts()]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*asked)

    said = asyncio.run(load())
    # The only decode worker's loss may cost an answer, a typed error then; a wrong one never.
    assert all(text in (503, right) for text, right in zip(said, expected, strict=True)), said
    if victim == "prefill-0":
        assert said == expected
    pair.until_metric("trtserve_worker_up", lambda count: count == 2, 120)
    assert asyncio.run(answers(pair.url)) == expected
