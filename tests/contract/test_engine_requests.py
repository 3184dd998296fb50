"""The TensorRT-LLM engine's requests on the stand-in: errors of one and of all, cancels, ranks, versions."""

from __future__ import annotations

import json
import time
from array import array
from dataclasses import replace

import pytest

from tests.models import EOS_TOKEN_ID, MAX_SEQ_LEN, VOCAB_SIZE
from trtserve.plugins.api import EngineConfig, FinishReason, KVStored, Request, Role, SamplingParams
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.conformance.case import EngineCase
from trtserve.plugins.conformance.sink import CollectingSink
from trtserve.plugins.engines.tensorrt_llm import make_engine

DEADLINE_S = 20
PROMPT = array("i", range(10, 30))


@pytest.fixture
def case(model_folder, import_trtllm, violations, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "never")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_STEP_MS", "0")
    import_trtllm()
    config = EngineConfig(
        model_path=str(model_folder), block_size=8, num_blocks=400, max_num_seqs=6, max_num_tokens=64,
        max_seq_len=MAX_SEQ_LEN, options={"warm_up_requests": 1},
    )  # fmt: skip
    yield EngineCase(lambda config: make_engine("tensorrt_llm", config), config, VOCAB_SIZE, (EOS_TOKEN_ID,), 20)
    assert violations() == []


@pytest.fixture
def broken(case):
    """A started engine and its sink, which may fail."""
    engine, sink = case.make(case.config), CollectingSink()
    engine.start(sink)
    yield engine, sink
    engine.close()


def is_idle(running):
    load = running.engine.stats()
    nothing = (load.running, load.waiting, load.free_blocks) == (0, 0, running.info.num_blocks)
    return nothing and not running.engine._serving._generation._live


def with_options(case, **options):
    return replace(case, config=replace(case.config, options={**case.config.options, **options}))


def test_a_request_error_ends_one_request(case, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_REQUEST_ERROR_TOKEN", "98")
    with case.running() as running:
        ended = running.generate(array("i", [98, *PROMPT]))
        assert (ended.finish_reason, ended.token_ids) == (FinishReason.ERROR, [])
        assert "this request fails" in ended.error
        assert running.generate(PROMPT).finish_reason is FinishReason.LENGTH
        assert is_idle(running)


def test_any_other_error_ends_the_engine(monkeypatch, request):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_FATAL_ERROR_TOKEN", "99")
    engine, sink = request.getfixturevalue("broken")
    sampling = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    engine.submit(Request(1, PROMPT, sampling))
    sink.wait_first_output(1, DEADLINE_S)
    engine.submit(Request(2, array("i", [99]), sampling))
    assert "fatal error" in str(sink.wait_failure(DEADLINE_S))
    engine.submit(Request(3, PROMPT, sampling))  # nothing happens any more, and nothing is raised
    engine.cancel(1)
    engine.close()
    assert len(sink.failures) == 1


def test_an_executor_that_dies_in_silence_is_noticed(broken):
    engine, sink = broken
    engine._serving._executor.llm._engine._die(RuntimeError("a rank is gone"))
    assert "not healthy" in str(sink.wait_failure(DEADLINE_S))


def test_an_error_that_only_looks_like_a_refusal_ends_the_engine(broken):
    engine, sink = broken
    sampling = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    engine.submit(Request(1, PROMPT, sampling))
    sink.wait_first_output(1, DEADLINE_S)
    live = engine._serving._generation._live[1]

    from tensorrt_llm.executor.result import Response

    response = Response(error=ValueError("from a background thread"), is_final=True)
    engine._loop.call_soon_threadsafe(live.result._put, response)
    assert "background" in str(sink.wait_failure(DEADLINE_S))


def test_a_result_that_is_not_understood_ends_one_request(case):
    with case.running() as running:
        number = running.submit(PROMPT, max_tokens=3000, logprobs=1)
        running.sink.wait_first_output(number, DEADLINE_S)
        running.engine._serving._generation._live[number].result.outputs[0].logprobs = []
        running.wait(number)
        last = running.sink.outputs_of(number)[-1]
        assert last.finish_reason is FinishReason.ERROR and "not understood" in last.error and not last.is_refused
        assert running.generate(PROMPT).finish_reason is FinishReason.LENGTH
        assert is_idle(running)


def test_cancels_in_every_phase(case):
    with case.running(max_num_seqs=1) as running:
        first = running.submit(PROMPT, max_tokens=3000)
        running.sink.wait_first_output(first, DEADLINE_S)
        queued = running.submit(PROMPT[1:], max_tokens=3000)
        at_once = running.submit(PROMPT[2:], max_tokens=3000)
        running.engine.cancel(at_once)
        running.engine.cancel(queued)
        running.engine.cancel(first)
        for number in (first, queued, at_once):
            assert running.ended(number).finish_reason is FinishReason.CANCELLED
        assert is_idle(running)


def test_closing_while_requests_run_and_wait(broken):
    engine, sink = broken
    sampling = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
    for number in range(1, 12):
        engine.submit(Request(number, PROMPT, sampling))
    sink.wait_first_output(1, DEADLINE_S)
    begun = time.monotonic()
    engine.close()
    engine.close()
    assert time.monotonic() - begun < 10
    assert sink.failures == [] and sink.stays_silent(0.05)


def test_attention_dp_ranks(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_REQUESTS", str(tmp_path / "requests"))
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with with_options(case, tensor_parallel_size=2, enable_attention_dp=True).running() as running:
        assert running.info.num_ranks == 2
        prompts = {rank: array("i", [100 + rank, *range(200, 220)]) for rank in (0, 1)}
        for rank, prompt in prompts.items():
            running.engine.submit(Request(1 + rank, prompt, sampling, rank=rank))
        running.sink.wait_ended([1, 2], DEADLINE_S)
        running.engine.submit(Request(3, PROMPT, sampling, rank=2))
        running.engine.submit(Request(4, PROMPT, sampling, rank=-1))
        running.sink.wait_ended([3, 4], DEADLINE_S)
        for number in (3, 4):
            assert running.sink.outputs_of(number)[-1].finish_reason is FinishReason.ERROR
        deadline = time.monotonic() + DEADLINE_S
        wanted = {rank: set(block_hashes(prompt, 8)[:2]) for rank, prompt in prompts.items()}
        while any(not blocks <= _stored(running.sink, rank) for rank, blocks in wanted.items()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not wanted[0] & _stored(running.sink, 1) and not wanted[1] & _stored(running.sink, 0)
        assert is_idle(running)
    lines = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    asked = [line["scheduling_params"] for line in lines if line["prompt_token_ids"][0] in (100, 101)]
    assert sorted(asked) == [f"SchedulingParams(attention_dp_rank={rank}, attention_dp_relax=False)" for rank in (0, 1)]


def _stored(sink, rank):
    events = [event for step in sink.steps if step.rank == rank for event in step.events]
    return {block.hash for event in events if isinstance(event, KVStored) for block in event.blocks}


@pytest.mark.parametrize(
    ("variable", "names", "num_ranks"),
    [
        ("WITHOUT", "generate_async.scheduling_params", 1),
        ("WITHOUT", "SchedulingParams.attention_dp_relax", 2),
        (
            "WITH",
            "generate_async.priority,DisaggregatedParams.disagg_request_id,SamplingParams.prompt_ignore_length",
            2,
        ),
        ("WITHOUT", "generate_async.cache_salt,generate_async.trace_headers", 2),
    ],
)
def test_other_versions(case, monkeypatch, import_trtllm, variable, names, num_ranks):
    monkeypatch.setenv(f"TENSORRT_LLM_STAND_IN_{variable}", names)
    import_trtllm()
    sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    with with_options(case, tensor_parallel_size=2, enable_attention_dp=True).running() as running:
        assert running.info.num_ranks == num_ranks
        for rank in range(num_ranks):
            running.engine.submit(Request(1 + rank, PROMPT, sampling, rank=rank))
            running.sink.wait_ended([1 + rank], DEADLINE_S)
            assert running.sink.outputs_of(1 + rank)[-1].finish_reason is FinishReason.LENGTH
        salted = Request(9, PROMPT, sampling, cache_salt="tenant")
        running.engine.submit(salted)
        running.sink.wait_ended([9], DEADLINE_S)
        is_refused = running.sink.outputs_of(9)[-1].finish_reason is FinishReason.ERROR
        assert is_refused is ("cache_salt" in names)


def test_speculation_is_counted(case):
    drafting = with_options(
        case, llm_args={"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 3}}
    )
    with case.running() as running:
        plain = running.generate(PROMPT, max_tokens=60)
    with drafting.running() as running:
        number = running.submit(PROMPT, max_tokens=60)
        assert running.ended(number).token_ids == plain.token_ids
        outputs = running.sink.outputs_of(number)
        assert max(len(output.token_ids) for output in outputs) > 1
        drafted, accepted = outputs[-1].speculation
        load = running.engine.stats()
        assert 0 < accepted < drafted and (drafted, accepted) == (load.drafted_tokens_total, load.accepted_tokens_total)


def test_more_host_blocks_than_the_router_may_hear_of(case):
    """A cache with host memory holds more blocks than the GPU does: never more are told than the engine said it has."""
    host = with_options(case, llm_args={"kv_cache_config": {"host_cache_size": 64 * 8 * 1024}})
    with host.running(num_blocks=24) as running:
        known, most = set(), 0
        for number in range(12):
            running.generate(case.prompt(40, number), max_tokens=2)
        running.sink.wait_events(24, DEADLINE_S)
        for event in running.sink.events:
            if isinstance(event, KVStored):
                known |= {block.hash for block in event.blocks}
            else:
                known -= set(event.hashes)
            most = max(most, len(known))
        assert 12 < most <= running.info.num_blocks == 24


def test_a_logit_bias_is_followed(case):
    with case.running() as running:
        assert list(running.generate(case.prompt(20), max_tokens=3, logit_bias=((77, 100.0),)).token_ids) == [77] * 3
        refused = running.generate(case.prompt(20), max_tokens=3, logit_bias=((VOCAB_SIZE, 1.0),))
        assert refused.finish_reason is FinishReason.ERROR and "logit_bias names token" in refused.error


@pytest.mark.parametrize(
    ("variables", "backend"),
    [((), "NIXL"), (("UCX",), "UCX"), (("NIXL", "UCX"), "NIXL"), (("MOONCAKE", "UCX"), "UCX")],
)
def test_what_the_default_transceiver_is(case, monkeypatch, variables, backend):
    for name in ("NIXL", "UCX", "MOONCAKE", "MPI"):
        monkeypatch.setenv(f"TRTLLM_USE_{name}_KVCACHE", "1" if name in variables else "0")
    config = with_options(case, transceiver_backend="DEFAULT").config
    engine = case.make(replace(config, role=Role.DECODE))
    try:
        assert f"tensorrt_llm, {backend}, " in engine.start(CollectingSink()).kv_fingerprint
    finally:
        engine.close()


def test_arguments_that_the_installed_version_lacks_are_named_all_at_once(case, import_trtllm, monkeypatch):
    gone = "TorchLlmArgs.enable_chunked_prefill,TorchLlmArgs.enable_iter_perf_stats"
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_WITHOUT", gone)
    import_trtllm()
    engine = case.make(case.config)
    with pytest.raises(ValueError, match=r"1\.2\.1 has no argument enable_chunked_prefill.*, enable_iter_perf_stats"):
        engine.start(CollectingSink())
    engine.close()


@pytest.mark.parametrize("drop_every", ["1", "0"])
def test_kv_events_that_never_come_are_missed(case, monkeypatch, caplog, drop_every):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_DROP_EVERY_EVENT", drop_every)
    with case.running() as running:
        for number in range(18):
            running.generate(case.prompt(20, number), max_tokens=2)
        if drop_every == "0":
            running.sink.wait_events(1, DEADLINE_S)
    assert ("has told of no stored KV block in 16 requests" in caplog.text) is (drop_every == "1")
