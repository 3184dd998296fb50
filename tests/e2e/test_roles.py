"""Workers that get another role while the server runs: drained first, and no answer is the worse for it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess, eventually
from trtserve.plugins.manager import PluginManager

PATH = "/v1/completions"
NUM_BLOCKS = 512
PROMPTS = [[7 + number] * (20 + 13 * number) for number in range(20)]


def disagg(serve: Serve, *more: str, prefill: int, decode: int, options: tuple[str, ...]) -> ServerProcess:
    flags = ("--mode", "disagg", "--prefill-workers", str(prefill), "--decode-workers", str(decode))
    flags += ("--disagg-policy", "always", "--max-num-tokens", "256")
    server = serve(*flags, *more, num_blocks=NUM_BLOCKS, options=options).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == prefill + decode)
    return server


def change(server: ServerProcess, worker: str, role: str, **fields: object) -> httpx.Response:
    return server.client.post(f"/v1/workers/{worker}/role", json={"role": role, **fields})


def worker(server: ServerProcess, worker_id: str) -> dict:
    listed = server.client.get("/v1/workers").raise_for_status().json()["workers"]
    return next(one for one in listed if one["id"] == worker_id)


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def answer(client: httpx.Client, prompt: list[int]) -> str:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    return client.post(PATH, json=body).raise_for_status().json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def slow(serve_module: Serve) -> ServerProcess:
    """Two prefill workers and one decode worker, at the simulated engine's own speed."""
    return disagg(serve_module, prefill=2, decode=1, options=())


@pytest.fixture
def long_answer(slow: ServerProcess) -> Iterator[None]:
    """A request that decodes for a long time."""
    with slow.client.stream("POST", PATH, json={"prompt": [9] * 40, "max_tokens": 4000, "stream": True}) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        eventually(lambda: worker(slow, "decode-0")["booked_sequences"] == 1, "it is there")
        yield
        slow.client.delete(f"/v1/requests/{response.headers['x-request-id']}")
        assert any('"error"' in line for line in lines), "cancelled by id, or its worker was lost"


def test_what_cannot_be_is_refused(slow: ServerProcess):
    assert refusal(change(slow, "nobody-0", "decode")) == (404, "not_found")
    assert refusal(change(slow, "prefill-0", "cook")) == (400, "invalid_value")
    assert refusal(change(slow, "prefill-0", "agg")) == (400, "invalid_value")
    assert refusal(change(slow, "prefill-0", "decode", drain_timeout_s=0)) == (400, "invalid_value")
    assert refusal(change(slow, "prefill-0", "decode", forse=True)) == (400, "invalid_value")
    assert refusal(change(slow, "decode-0", "prefill")) == (409, "last_of_its_role")
    assert change(slow, "decode-0", "decode").json()["former_role"] == "decode", "nothing to do"
    assert {worker(slow, name)["state"] for name in ("prefill-0", "prefill-1", "decode-0")} == {"ready"}


def test_who_reads_whom_is_told(slow: ServerProcess):
    slow.until_metric("trtserve_kv_link_up", lambda value: value == 2)
    links = sorted(worker(slow, "decode-0")["kv"]["reads_from"], key=lambda link: link["worker"])
    assert [(link["worker"], link["transfer"], link["problem"]) for link in links] == [
        ("prefill-0", "shm", None),
        ("prefill-1", "shm", None),
    ]
    now = slow.metrics()
    info = f'trtserve_kv_link_info{{from="prefill-0",lane="{links[0]["lane"]}",to="decode-0",transfer="shm"}}'
    assert now[info] == 1
    bandwidth = now['trtserve_kv_link_bandwidth_bytes_per_second{from="prefill-0",to="decode-0"}']
    assert bandwidth == links[0]["bandwidth_bytes_per_second"] > 1e6
    assert slow.output.count("decode-0 reads the KV of prefill-1 by shm") == 1
    assert worker(slow, "prefill-0")["kv"]["reads_from"] == []


def test_aggregated_workers_have_one_role(server: ServerProcess):
    assert refusal(change(server, "agg-0", "decode")) == (409, "one_role")
    assert worker(server, "agg-0")["kv"] is None


def test_a_drain_that_takes_too_long_changes_nothing(slow: ServerProcess, long_answer: None):
    refused = change(slow, "decode-0", "prefill", drain_timeout_s=0.2, force=True)
    assert refusal(refused) == (409, "drain_timeout"), refused.text
    now = worker(slow, "decode-0")
    assert (now["role"], now["state"]) == ("decode", "ready")
    assert answer(slow.client, [3] * 50), "it takes requests again"


def test_while_it_drains_it_takes_nothing_and_no_second_change(slow: ServerProcess, long_answer: None):
    results: list[httpx.Response] = []
    draining = threading.Thread(
        target=lambda: results.append(change(slow, "decode-0", "prefill", drain_timeout_s=30, force=True))
    )
    draining.start()
    try:
        eventually(lambda: worker(slow, "decode-0")["state"] == "draining", "it drains")
        assert refusal(change(slow, "decode-0", "prefill", force=True)) == (409, "draining_already")
        refused = slow.client.post(PATH, json={"prompt": [5] * 50, "max_tokens": 3})
        assert refusal(refused) == (503, "no_worker"), "it was the last one, and that was forced"
        os.kill(slow.worker_pid("decode-0"), signal.SIGKILL)
    finally:
        draining.join(20)
    assert refusal(results[0]) == (409, "worker_not_ready")
    eventually(lambda: worker(slow, "decode-0")["state"] == "ready", "it is started again")
    assert worker(slow, "decode-0")["role"] == "decode"


def test_a_worker_goes_over_with_its_cache_and_comes_back_in_its_new_role(slow: ServerProcess):
    """Runs last: it kills."""
    prompt = [11] * 320
    expected = answer(slow.client, prompt)
    assert change(slow, "prefill-1", "decode").json()["former_role"] == "prefill"
    assert slow.metrics()['trtserve_worker_up{role="decode",worker="prefill-1"}'] == 1
    before = slow.metric("trtserve_kv_fetches_total")
    assert all(answer(slow.client, [*prompt, number]) for number in range(6))
    assert answer(slow.client, prompt) == expected
    assert slow.metric("trtserve_kv_fetches_total") > before
    index = slow.client.post("/v1/router/check").json()["workers"]
    assert not any(one["missing_blocks"] or one["extra_blocks"] for one in index), index
    os.kill(slow.worker_pid("prefill-1"), signal.SIGKILL)
    eventually(lambda: worker(slow, "prefill-1")["restarts"] == 1, "it is started again")
    eventually(lambda: worker(slow, "prefill-1")["state"] == "ready", "it is ready again")
    assert worker(slow, "prefill-1")["role"] == "decode"
    assert answer(slow.client, prompt) == expected


@pytest.mark.parametrize("transfer", ["shm", "ucx", "nixl"])
async def test_roles_flip_under_load(serve: Serve, transfer: str):
    """Each time the worker's connections are made anew, with processes that stay the same."""
    if PluginManager().problem("transfer", transfer) is not None:
        pytest.skip(f"{transfer} is not installed")
    server = disagg(serve, "--transfer", transfer, prefill=2, decode=2, options=("speedup=50",))
    expected = [answer(server.client, prompt) for prompt in PROMPTS]
    is_over = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=40) as client:

        async def ask(start: int) -> int:
            count = start
            while not is_over.is_set():
                number = count % len(PROMPTS)
                body = {"prompt": PROMPTS[number], "max_tokens": 12, "temperature": 0}
                got = (await client.post(PATH, json=body)).raise_for_status().json()["choices"][0]["text"]
                assert got == expected[number]
                count += 7
            return count - start

        async def flip() -> None:
            try:
                for name, role in [("prefill-1", "decode"), ("decode-0", "prefill"), ("decode-1", "prefill")] * 2:
                    back = name.partition("-")[0]
                    for wanted in (role, back):
                        body = {"role": wanted, "drain_timeout_s": 20}
                        changed = await client.post(f"/v1/workers/{name}/role", json=body)
                        assert changed.status_code == 200, changed.text
            finally:
                is_over.set()

        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(start)) for start in range(8)]
            group.create_task(flip())
    assert sum(task.result() for task in asked) >= 8 * 7
    now = server.metrics()
    assert not any(value for name, value in now.items() if "transfer_failed" in name), now
    server.until_idle(4 * NUM_BLOCKS)
    workers = server.client.get("/v1/workers").json()["workers"]
    assert all(one["role"] == one["id"].partition("-")[0] and one["state"] == "ready" for one in workers)
    eventually(
        lambda: (
            not any(
                one["kv"]["usage"]["leases"] or one["kv"]["usage"]["fetches"]
                for one in server.client.get("/v1/workers").json()["workers"]
            )
        ),
        "no lease and no fetch is left",
    )


async def test_changes_at_once_and_deaths_while_draining_end_cleanly(serve: Serve):
    """Every change ends in one of few ways, every answer is right or a typed error, and a role never runs empty."""
    server = disagg(serve, prefill=2, decode=2, options=("speedup=20",))
    expected = [answer(server.client, prompt) for prompt in PROMPTS]
    is_over = asyncio.Event()
    rng = random.Random(7)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=40) as client:

        async def wish(name: str, role: str) -> tuple[int, str]:
            response = await client.post(f"/v1/workers/{name}/role", json={"role": role, "drain_timeout_s": 15})
            return response.status_code, "" if response.status_code == 200 else response.json()["error"]["code"]

        async def ask(start: int) -> None:
            count = start
            while not is_over.is_set():
                number = count % len(PROMPTS)
                body = {"prompt": PROMPTS[number], "max_tokens": 12, "temperature": 0}
                response = await client.post(PATH, json=body)
                if response.status_code == 200:
                    assert response.json()["choices"][0]["text"] == expected[number]
                else:
                    assert refusal(response) in {(503, "worker_lost"), (503, "no_worker")}
                count += 7

        async def wishes() -> None:
            names = [f"{role}-{number}" for role in ("prefill", "decode") for number in (0, 1)]
            try:
                both = await asyncio.gather(wish("prefill-0", "decode"), wish("prefill-1", "decode"))
                assert sorted(both) == [(200, ""), (409, "last_of_its_role")]
                for turn in range(6):
                    wanted = [(rng.choice(names), rng.choice(["prefill", "decode"])) for _ in range(4)]
                    jobs = [asyncio.ensure_future(wish(*one)) for one in wanted]
                    if turn % 2:
                        await asyncio.sleep(0.01)
                        os.kill(server.worker_pid(wanted[0][0]), signal.SIGKILL)
                    for status, code in await asyncio.gather(*jobs):
                        assert status == 200 or code in ("last_of_its_role", "draining_already", "worker_not_ready")
                    kills = float((turn + 1) // 2)
                    await asyncio.to_thread(server.until_metric, "trtserve_worker_restarts_total", kills.__eq__)
                    await asyncio.to_thread(server.until_metric, "trtserve_worker_up", lambda value: value == 4)
                    listed = (await client.get("/v1/workers")).json()["workers"]
                    assert {one["role"] for one in listed} == {"prefill", "decode"}
            finally:
                is_over.set()

        async with asyncio.TaskGroup() as group:
            for start in range(6):
                group.create_task(ask(start))
            group.create_task(wishes())
    server.until_idle(4 * NUM_BLOCKS)
    assert [answer(server.client, prompt) for prompt in PROMPTS] == expected


def test_the_server_ends_while_a_worker_drains(serve: Serve):
    server = disagg(serve, prefill=1, decode=2, options=())
    with server.client.stream("POST", PATH, json={"prompt": [9] * 40, "max_tokens": 4000, "stream": True}) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(6)]
        assert [next(lines) for _ in range(6)]
        busy = next(one["id"] for one in server.client.get("/v1/workers").json()["workers"] if one["booked_sequences"])
        outcomes: list[httpx.Response] = []
        draining = threading.Thread(target=lambda: outcomes.append(change(server, busy, "prefill", drain_timeout_s=60)))
        draining.start()
        eventually(lambda: worker(server, busy)["state"] == "draining", "it drains")
        server.signal(signal.SIGTERM)
        draining.join(20)
        assert refusal(outcomes[0]) == (503, "draining")
        server.signal(signal.SIGTERM)
        assert any('"draining"' in line for line in lines)
    assert server.wait() == 6
