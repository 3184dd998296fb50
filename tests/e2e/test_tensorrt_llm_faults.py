"""The TensorRT-LLM engine where something goes wrong: requests, transfers, executors, processes, clients."""

from __future__ import annotations

import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.stand_in import StandInServer, stand_in_server

PATH = "/v1/completions"
PROMPTS = [[300 + (number * 7 + place) % 600 for place in range(5 + number * 13 % 90)] for number in range(12)]
BAD_TOKEN, FATAL_TOKEN = 990, 991  # in no prompt of the tests or of a warm-up


def ask(server: StandInServer, prompt: list[int], **fields: object) -> httpx.Response:
    return server.client.post(PATH, json={"prompt": prompt, "max_tokens": 24, "temperature": 0} | fields)


def answers(server: StandInServer) -> list[str]:
    """All prompts at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        responses = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
    assert [response.status_code for response in responses] == [200] * len(PROMPTS), responses[0].text
    return [response.json()["choices"][0]["text"] for response in responses]


@pytest.fixture(scope="module")
def expected(sim_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one aggregated worker says."""
    with stand_in_server(sim_model, tmp_path_factory.mktemp("agg")) as server:
        return answers(server)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"EXCLUDE_FIRST_TOKENS": "1"},
        {"CONTEXT_FINISH": "length", "TRANSFER_MS": "20", "EXCLUDE_FIRST_TOKENS": "hidden"},
        {"WITHOUT": "generate_async.scheduling_params,generate_async.cache_salt"},
    ],
    ids=["plain", "first-token-not-repeated", "slow-transfers", "older-version"],
)
def test_disaggregated_answers_are_those_of_one_worker(sim_model, tmp_path, expected, variables):
    with stand_in_server(sim_model, tmp_path, mode="disagg", decode=2, **variables) as server:
        assert answers(server) == expected
        assert server.metrics()['trtserve_mode_events_total{event="remote_prefill"}'] == len(PROMPTS)
        assert server.metric("trtserve_mode_events_total") == len(PROMPTS)  # and nothing else happened
        server.until_idle()


def test_speculation_says_the_same_and_is_counted(sim_model, tmp_path, expected):
    options = tmp_path / "options.yaml"
    options.write_text("speculative_config: {decoding_type: MTP, num_nextn_predict_layers: 3}")
    flags = ("--engine-option", f"extra_llm_api_options={options}")
    with stand_in_server(sim_model, tmp_path, *flags, mode="disagg") as server:
        assert answers(server) == expected
        drafted = server.metric("trtserve_worker_drafted_tokens_total")
        assert 0 < server.metric("trtserve_worker_accepted_tokens_total") < drafted
        body = {"prompt": PROMPTS[0], "max_tokens": 24}
        explained = server.client.post(PATH, json=body, headers={"x-trtserve-explain": "1"}).headers
        assert re.search(r"drafted_tokens=\d+; accepted_tokens=[1-9]", explained["x-trtserve-explain"])
        server.until_idle()


def test_a_transfer_that_fails_costs_a_prefill(sim_model, tmp_path, expected):
    with stand_in_server(sim_model, tmp_path, mode="disagg", TRANSFER_FAILURES="all") as server:
        assert "no KV could be handed over from prefill-0 to decode-0" in server.output
        assert answers(server) == expected
        assert server.metrics()['trtserve_mode_events_total{event="transfer_failed"}'] == len(PROMPTS)
        server.until_idle()


def test_a_worker_dies_under_load(sim_model, tmp_path, expected):
    """First one that prefills, then one that decodes; each time nobody has a prompt's KV yet."""
    with stand_in_server(
        sim_model, tmp_path, mode="disagg", prefill=2, decode=2, STEP_MS="10", TRANSFER_MS="30"
    ) as server:
        for victim in ("prefill-0", "decode-0"):
            pid = server.worker_pid(victim)
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                asked = [pool.submit(ask, server, prompt, cache_salt=victim) for prompt in PROMPTS]
                server.until_metric("trtserve_worker_running_sequences", bool)
                os.kill(pid, signal.SIGKILL)
                responses = [future.result() for future in asked]
            assert {response.status_code for response in responses} == {200}, [one.text for one in responses]
            assert [response.json()["choices"][0]["text"] for response in responses] == expected
            server.until_serving()
            server.until_idle()


def test_a_bad_request_fails_alone_and_a_broken_executor_is_replaced(sim_model, tmp_path, expected):
    with stand_in_server(
        sim_model, tmp_path, REQUEST_ERROR_TOKEN=str(BAD_TOKEN), FATAL_ERROR_TOKEN=str(FATAL_TOKEN)
    ) as server:
        refused = ask(server, [BAD_TOKEN])
        assert refused.status_code == 500 and "this request fails" in refused.json()["error"]["message"]
        impossible = ask(server, PROMPTS[0], min_tokens=3, stop_token_ids=[7])
        assert (impossible.status_code, impossible.json()["error"]["code"]) == (400, "not_supported_by_engine")
        assert answers(server) == expected
        broken = ask(server, [FATAL_TOKEN])
        assert broken.status_code == 503 and broken.json()["error"]["code"] == "worker_lost"
        server.until_metric("trtserve_worker_restarts_total", lambda count: count == 1)
        server.until_metric("trtserve_worker_up", lambda count: count == 1)
        assert answers(server) == expected


@pytest.mark.parametrize("mode", ["agg", "disagg"])
def test_clients_that_leave_free_what_they_held_and_break_no_transfer(sim_model, tmp_path, mode):
    with stand_in_server(sim_model, tmp_path, mode=mode, STEP_MS="5", TRANSFER_MS="200") as server:
        for timeout_s in (0.03, 0.1, 0.25, 0.5):
            with ThreadPoolExecutor(4) as pool:
                for prompt in PROMPTS[:4]:
                    pool.submit(_leave, server, prompt, timeout_s)
        server.until_idle()
        assert server.broken_rules() == []


def test_attention_dp_ranks_are_routed_to(sim_model, tmp_path, expected):
    options = ("--engine-option", "tensor_parallel_size=2", "--engine-option", "enable_attention_dp=true")
    with stand_in_server(sim_model, tmp_path, *options, REQUESTS=str(tmp_path / "requests")) as server:
        assert answers(server) == expected
        state = server.client.get("/v1/router/state").json()
        assert [worker["id"] for worker in state["workers"]] == ["agg-0/0", "agg-0/1"]
        ask(server, PROMPTS[3])
        lines = (tmp_path / "requests").read_text().splitlines()
        assert {rank for rank in (0, 1) if any(f'"attention_dp_rank": {rank}' in line for line in lines)} == {0, 1}


def test_forms_reach_the_engine_as_bare_schemas(sim_model, tmp_path):
    requests = tmp_path / "requests"
    option = ("--engine-option", "guided_decoding_backend=xgrammar")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with stand_in_server(sim_model, tmp_path, *option, mode="disagg", REQUESTS=str(requests)) as server:
        wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        assert ask(server, PROMPTS[0], response_format=wrapped).status_code == 200
        assert ask(server, PROMPTS[0], guided_regex="[a-z]+").status_code == 200
        bad = ask(server, PROMPTS[0], response_format={"type": "xml"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "response_format.type")
    guides = [json.loads(line)["sampling_params"].get("guided_decoding") for line in requests.read_text().splitlines()]
    told = [guide for guide in guides if guide]
    assert len(told) == 4  # each request in both of its phases
    bare = json.dumps(schema, separators=(",", ":"))
    assert all(f"json='{bare}'" in guide for guide in told[:2]) and all("regex='[a-z]+'" in guide for guide in told[2:])


def _leave(server: StandInServer, prompt: list[int], timeout_s: float) -> None:
    with pytest.raises(httpx.TimeoutException):
        server.client.post(PATH, json={"prompt": prompt, "max_tokens": 600}, timeout=timeout_s)
