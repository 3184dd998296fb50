"""Sections of one role reach the engines of that role's workers, in a whole server."""

from __future__ import annotations

import json

from tests.e2e.process import Serve


def test_roles_have_engines_of_their_own(serve: Serve, tmp_path):
    path = tmp_path / "serve.yaml"
    section = {"num_blocks": 32, "engine_options": {"num_draft_tokens": 2}}
    path.write_text(json.dumps({"decode": section}))
    flags = ("--mode", "disagg", "--disagg-policy", "always", "--config", str(path))
    server = serve(*flags, options=("speedup=20",), TRTSERVE_PREFILL__NUM_BLOCKS="48").until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)
    body = {"prompt": [9] * 150, "max_tokens": 8, "temperature": 0}
    answer = server.client.post("/v1/completions", json=body).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == 8
    server.until_idle(48 + 32)
    free = {name: value for name, value in server.metrics().items() if name.startswith("trtserve_worker_free_blocks")}
    assert {("prefill" in name, value) for name, value in free.items()} == {(True, 48), (False, 32)}


def test_prefill_workers_bound_prompts_and_decode_workers_the_whole(serve: Serve):
    sections = ("--prefill.max-seq-len", "128", "--decode.max-seq-len", "512")
    flags = ("--mode", "disagg", "--disagg-policy", "always", *sections)
    server = serve(*flags, options=("speedup=50",)).until_ready()
    server.until_metric("trtserve_worker_up", lambda value: value == 2)

    def status(num_prompt_tokens: int, max_tokens: int) -> tuple[int, str]:
        body = {"prompt": [9] * num_prompt_tokens, "max_tokens": max_tokens, "ignore_eos": True}
        response = server.client.post("/v1/completions", json=body)
        error = response.json().get("error")
        return response.status_code, "" if error is None else error["message"]

    assert status(127, 385) == (200, "")
    code, message = status(128, 8)
    assert code == 400 and "prompts of up to 127 are taken" in message
    code, message = status(127, 386)
    assert code == 400 and "this model's context is 512" in message
    assert server.metric("trtserve_mode_events_total") == 1
