"""KV-aware routing through HTTP: prefixes are found again, the index is what the workers have, nothing stays booked."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.process import Serve, ServerProcess, TrtserveProcess, eventually, sim_arguments
from tests.e2e.sse import stream

PATH = "/v1/completions"
EXPLAIN = {"X-Trtserve-Explain": "1"}
FIELD = re.compile(r"(\w+)=([^;]+)")


def prompt_of(conversation: int, turn: int) -> list[int]:
    """Turns of a conversation continue each other; a third of the conversations share a long beginning."""
    shared = [7] * 64 if conversation % 3 == 0 else [10 + conversation] * 16
    return [*shared, *([300 + conversation] * 24 * (turn + 1))]


@asynccontextmanager
async def client_of(server: ServerProcess) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, trust_env=False, timeout=30) as client:
        yield client


async def converse(client: httpx.AsyncClient, conversation: int, turns: int) -> list[int]:
    """The statuses of one conversation's turns, one after the other."""
    statuses = []
    for turn in range(turns):
        body = {"prompt": prompt_of(conversation, turn), "max_tokens": 8}
        statuses.append((await client.post(PATH, json=body)).status_code)
    return statuses


async def load(server: ServerProcess, conversations: int, turns: int) -> list[int]:
    async with client_of(server) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(converse(client, number, turns)) for number in range(conversations)]
    return [status for task in tasks for status in task.result()]


def check_index(server: ServerProcess, workers: int) -> list[dict]:
    """The index against the workers' own sets; returns the rows."""
    rows = server.client.post("/v1/router/check").json()["workers"]
    assert len(rows) == workers
    for row in rows:
        assert row["was_known"] and row["missing_blocks"] == row["extra_blocks"] == 0, row
    return rows


def is_unreserved(server: ServerProcess) -> bool:
    workers = server.client.get("/v1/router/state").json()["workers"]
    return not any(worker["reserved_blocks"] or worker["booked_requests"] for worker in workers)


async def test_eight_workers_under_load_leave_nothing_booked_and_a_true_index(serve: Serve):
    """The caches hold 24 blocks each, so blocks are evicted all the time."""
    server = serve("--workers", "8", num_blocks=24, options=("speedup=20",)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 8)
    assert set(await load(server, conversations=48, turns=5)) == {200}
    server.until_idle(8 * 24)
    assert is_unreserved(server)
    rows = check_index(server, 8)
    state = server.client.get("/v1/router/state").json()
    # by name: the router has them in the order in which they became ready
    stored = {worker["id"]: worker["stored_blocks"] for worker in state["workers"]}
    assert stored == {row["id"]: row["stored_blocks"] for row in rows}
    assert sum(row["stored_blocks"] for row in rows) > 8
    assert server.metric("trtserve_routing_decisions_total") == 48 * 5
    assert server.metric("trtserve_worker_kv_event_gaps_total") == 0
    assert server.metric("trtserve_cached_prompt_tokens_total") > 0


async def test_a_worker_that_crashes_under_load_comes_back_with_an_empty_part(serve: Serve):
    server = serve("--workers", "3", num_blocks=24, options=("speedup=5",)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 3)
    loading = asyncio.create_task(load(server, conversations=24, turns=6))
    await asyncio.to_thread(server.until_metric, "trtserve_routing_decisions_total", lambda value: value > 20)
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    statuses = await loading
    assert len(statuses) == 24 * 6 and set(statuses) <= {200, 503} and statuses.count(200) > 100
    server.until_metric("trtserve_worker_up", lambda value: value == 3)
    server.until_idle(3 * 24)
    assert is_unreserved(server)
    check_index(server, 3)


async def test_a_worker_that_joins_late_gets_its_share(serve: Serve, sim_model: Path, tmp_path: Path):
    endpoint, token = f"ipc://{tmp_path}/workers.sock", "a-long-secret-of-the-tests"
    server = serve(
        *("--workers", "1", "--worker-endpoint", endpoint, "--max-num-seqs", "2"),
        num_blocks=64,
        options=("speedup=5",),
        TRTSERVE_WORKER_TOKEN=token,
    ).until_ready()
    loading = asyncio.create_task(load(server, conversations=16, turns=8))
    arguments = sim_arguments(
        *(sim_model, "--connect", endpoint, "--worker-id", "late-0", "--max-num-seqs", "2"),
        options=("speedup=5",),
    )
    with TrtserveProcess("worker", *arguments, environment={"TRTSERVE_WORKER_TOKEN": token}):
        assert set(await loading) == {200}
        await asyncio.to_thread(server.until_metric, "trtserve_worker_up", lambda value: value == 2)
        assert set(await load(server, conversations=16, turns=2)) == {200}
        server.until_idle(2 * 64)
        rows = check_index(server, 2)
        late = next(row for row in rows if row["id"] == "late-0")
        assert late["stored_blocks"] > 8, "more than its warm-up left there"


@pytest.fixture(scope="module")
def pair(serve_module: Serve) -> ServerProcess:
    """Two workers with the default router, to which pass times are given: a busy machine's may be anything."""
    times = ("--pinned-estimates.prefill-ms", "1,0.01,0", "--pinned-estimates.decode-ms", "1,0,0")
    server = serve_module("--workers", "2", *times, options=("speedup=20",)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    return server


def explained(header: str) -> dict[str, str]:
    return dict(FIELD.findall(header))


def test_an_answer_explains_where_it_came_from(pair: ServerProcess):
    body = {"prompt": [500] * 100, "max_tokens": 2}
    first, second = (pair.client.post(PATH, json=body, headers=EXPLAIN) for _ in range(2))
    one, two = (explained(response.headers["x-trtserve-explain"]) for response in (first, second))
    assert (one["overlap_blocks"], one["predicted_cached_tokens"], one["cached_tokens"]) == ("0", "0", "0")
    assert (two["overlap_blocks"], two["predicted_cached_tokens"], two["cached_tokens"]) == ("6", "96", "96")
    assert one["worker"] == two["worker"] and float(two["cost_ms"]) < float(one["cost_ms"])
    assert second.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    assert "x-trtserve-explain" not in pair.client.post(PATH, json=body).headers


def test_a_stream_and_every_choice_are_explained(pair: ServerProcess):
    body = {"prompt": [501] * 100, "max_tokens": 2, "n": 3, "temperature": 1.0}
    with pair.client.stream("POST", PATH, json=body | {"stream": True}, headers=EXPLAIN) as response:
        response.read()
    assert response.headers["x-trtserve-explain"].count("worker=") == 3


def test_salts_share_nothing(pair: ServerProcess):
    body = {"prompt": [502] * 100, "max_tokens": 2, "cache_salt": "one"}
    pair.client.post(PATH, json=body)
    other = pair.client.post(PATH, json=body | {"cache_salt": "other"}, headers=EXPLAIN)
    same = pair.client.post(PATH, json=body, headers=EXPLAIN)
    assert explained(other.headers["x-trtserve-explain"])["overlap_blocks"] == "0"
    assert explained(same.headers["x-trtserve-explain"])["overlap_blocks"] == "6"


def test_chats_find_the_template_and_their_earlier_turns(pair: ServerProcess):
    messages = [{"role": "system", "content": "You are terse. " * 8}, {"role": "user", "content": "First question?"}]
    body = {"model": "sim", "messages": messages, "max_tokens": 4}
    answer = pair.client.post("/v1/chat/completions", json=body).json()
    text = answer["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And the second?"}]
    cached = pair.client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens_details"]
    assert cached["cached_tokens"] >= answer["usage"]["prompt_tokens"] // 16 * 16


def test_the_state_shows_what_was_learnt(pair: ServerProcess):
    stream(pair.client, PATH, {"prompt": [503] * 40, "max_tokens": 30})
    state = eventually(
        lambda: is_unreserved(pair) and pair.client.get("/v1/router/state").json(), "the request's booking is over"
    )
    assert state["policy"] == "kv" and state["held"] == {"requests": 0, "prompt_tokens": 0}
    times = state["pass_times"]["agg"]
    assert times["prefill"]["num_passes"] >= 6 and times["decode"]["num_passes"] >= 20
    assert state["estimates"]["num_sequences"] > 0
    assert all(worker["events"]["is_known"] for worker in state["workers"])


def test_decisions_are_logged_and_estimates_pinned(serve: Serve, tmp_path: Path):
    log = tmp_path / "decisions.jsonl"
    server = serve(
        *("--router", "kv_arrival", "--decision-log", str(log), "--pinned-estimates.output-tokens", "40"),
        options=("speedup=20",),
    ).until_ready()
    for _ in range(3):
        server.client.post(PATH, json={"prompt": [9] * 50, "max_tokens": 2})
    assert server.client.get("/v1/router/state").json()["estimates"]["pinned"]["output_tokens"] == 40
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["policy"] for record in records] == ["kv_arrival"] * 3
    assert [list(record["held"][0]["overlaps"].values()) for record in records] == [[], [3], [3]]
    assert all(record["estimates"]["output_tokens"] == 40 for record in records)


def test_a_log_that_cannot_be_written_is_told_at_the_start(sim_model: Path):
    with TrtserveProcess(*sim_arguments(sim_model, "--port", "0", "--decision-log", "/nowhere/at/all")) as process:
        assert process.wait() == 2
    assert "--decision-log /nowhere/at/all: cannot be written" in process.output
