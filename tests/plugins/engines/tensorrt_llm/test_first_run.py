"""The questions for the first GPU run, asked of the stand-in, which answers as its variables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_tiny_model

STAND_IN = Path(__file__).parents[3] / "contract"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("first_run") / "tiny")


def ask(model: Path, *only: str, **variables: str) -> tuple[int, dict[str, dict]]:
    """Exit code, and what was said to each question."""
    stand_in = {f"TENSORRT_LLM_STAND_IN_{name}": value for name, value in variables.items()}
    environment = os.environ | {"PYTHONPATH": str(STAND_IN)} | stand_in
    command = [sys.executable, "-m", "trtserve.plugins.engines.tensorrt_llm.first_run", str(model)]
    command += [argument for name in only for argument in ("--only", name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {record["question"]: record for record in records}


def test_every_question_has_an_answer(model):
    code, records = ask(model)
    answers = {name: record["answer"] for name, record in records.items()}
    assert (code, len(answers)) == (0, 12)
    assert answers["disaggregated_fields"]["version"] == "1.2.1"
    assert not answers["disaggregated_fields"]["has_disagg_request_id"]
    assert answers["first_token_in_decode"]["token_ids_repeat_it"]
    honoured = {name for name, is_so in answers["sampling_parameters"].items() if is_so}
    assert {"seed", "embedding_bias", "bad_token_ids", "stop_token_ids"} <= honoured and "top_p" not in honoured
    assert answers["statistics_names"]["missing"] == []
    assert not answers["abort_in_transfer"]["safe"]
    waits = answers["events_without_requests"]
    assert waits["events_after_a_request"] and waits["then_events"] == 0 and waits["after_a_new_request"]
    assert answers["end_token_in_output"]["kept"]
    assert answers["early_ends"]["finish_reasons_at_the_end"].count(None) == 3
    assert answers["logprobs"] == {"1": [1] * 3, "2": [2] * 3, "5": [5] * 3}
    assert not answers["merging"]["deep"]


def test_another_library_gives_other_answers(model):
    names = ("disaggregated_fields", "first_token_in_decode", "end_token_in_output", "early_ends")
    variables = {"WITH": "DisaggregatedParams.disagg_request_id", "EXCLUDE_FIRST_TOKENS": "1"}
    code, records = ask(model, *names, **variables, END_TOKEN="trimmed", EARLY_ENDS="1")
    answers = {name: record["answer"] for name, record in records.items()}
    assert (code, set(answers)) == (0, set(names))
    assert answers["disaggregated_fields"]["has_disagg_request_id"]
    assert not answers["first_token_in_decode"]["token_ids_repeat_it"]
    assert not answers["end_token_in_output"]["kept"]
    assert answers["early_ends"]["told_before_the_end"]


def test_a_question_that_cannot_be_asked_is_an_error(model):
    code, records = ask(model, "first_token_in_decode", TRANSFER_FAILURES="all")
    assert code == 1
    assert "this KV transfer fails" in records["first_token_in_decode"]["error"]
