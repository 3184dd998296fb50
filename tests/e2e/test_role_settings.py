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
