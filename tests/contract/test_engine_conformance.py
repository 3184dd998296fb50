"""The TensorRT-LLM engine passes the suite of all engines, on the stand-in, and breaks none of its rules."""

import pytest

from tests.models import EOS_TOKEN_ID, MAX_SEQ_LEN, VOCAB_SIZE
from trtserve.plugins.api import EngineConfig, FinishReason
from trtserve.plugins.conformance.engine import *  # noqa: F403
from trtserve.plugins.conformance.engine import EngineCase
from trtserve.plugins.engines.tensorrt_llm import make_engine

LENGTHS = {"plain": "never", "ending": "natural", "trimmed": "natural"}


@pytest.fixture(params=LENGTHS)
def engine_under_test(request, model_folder, import_trtllm, violations, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", LENGTHS[request.param])
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_END_TOKEN", "trimmed" if request.param == "trimmed" else "kept")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_STEP_MS", "0")
    import_trtllm()
    config = EngineConfig(
        model_path=str(model_folder),
        block_size=8,
        num_blocks=400,
        max_num_seqs=6,
        max_num_tokens=64,
        max_seq_len=MAX_SEQ_LEN,
        options={"warm_up_requests": 1},
    )
    yield EngineCase(lambda config: make_engine("tensorrt_llm", config), config, VOCAB_SIZE, (EOS_TOKEN_ID,))
    assert violations() == []


def test_min_tokens_holds_stop_tokens_back(engine_under_test):
    """In place of the suite's: this engine can hold back its one end token, and refuses what it cannot."""
    prompt = engine_under_test.prompt(20)
    with engine_under_test.running() as running:
        ended = running.generate(prompt, max_tokens=12, min_tokens=6, ignore_eos=False)
        assert EOS_TOKEN_ID not in ended.token_ids[:6]
        refused = running.generate(prompt, max_tokens=12, min_tokens=6, stop_token_ids=(7,))
        assert refused.finish_reason is FinishReason.ERROR and "min_tokens" in refused.error


def test_events_that_the_executor_lost_are_counted(engine_under_test, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_DROP_EVERY_EVENT", "3")
    with engine_under_test.running() as running:
        for number in range(6):
            running.generate(engine_under_test.prompt(40, number), max_tokens=2)
        running.sink.wait_events(4, running.deadline_s)
        assert running.engine.stats().lost_kv_events_total > 0
