"""Shipped profiles as whole servers, with the stand-in for TensorRT-LLM behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.process import ServerProcess

STAND_IN = str(Path(__file__).parents[1] / "contract")


@pytest.mark.parametrize(
    ("profile", "longest_prompt"),
    [("disagg_router", None), ("deepseek_r1/agg", 8447), ("llama4/eagle/disagg", 8191)],
)
def test_a_profile_serves(sim_model, profile, longest_prompt):
    arguments = (str(sim_model), "--config", profile, "--warm-up-timeout", "0")
    with ServerProcess(*arguments, environment={"PYTHONPATH": STAND_IN}) as server:
        server.until_ready()
        # Longer than a pass of these decode workers.
        body = {"prompt": [9] * 1000, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = server.client.post("/v1/completions", json=body).raise_for_status().json()
        assert answer["usage"] | {"completion_tokens": 8, "prompt_tokens": 1000} == answer["usage"]
        if "disagg" in profile:
            events = {name: value for name, value in server.metrics().items() if "mode_events_total" in name}
            assert events == {'trtserve_mode_events_total{event="remote_prefill"}': 1}
        if longest_prompt is not None:
            refused = server.client.post("/v1/completions", json=body | {"prompt": [9] * (longest_prompt + 1)})
            assert refused.json()["error"]["code"] == "context_length_exceeded"
