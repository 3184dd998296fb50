"""A prompt prefilled in one process and decoded in another: the same tokens, and every way to do it wrong."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import os
import sys

import pytest

from tests.contract.conftest import CONTRACT

PROMPT = [5, 6, 7, 8, 9, 10]

DECODE = """
import asyncio, base64, json, sys
import tensorrt_llm as trtllm

async def main():
    folder, prompt, params = json.loads(sys.argv[1])
    params["opaque_state"] = base64.b64decode(params["opaque_state"])
    llm = trtllm.LLM(folder, skip_tokenizer_init=True, cache_transceiver_config={"backend": "UCX"})
    sampling = trtllm.SamplingParams(end_id=2, max_tokens=8, ignore_eos=True)
    params = trtllm.DisaggregatedParams(**params | {"request_type": "generation_only"})
    result = await llm.generate_async(prompt, sampling, disaggregated_params=params)
    print(json.dumps(result.outputs[0].token_ids))
    llm.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def make_worker(make_llm):
    """An LLM that hands KV over and takes it, with overlap scheduling off."""

    def make(backend: str = "UCX", timeout_ms: int = 60_000, mtp: int = 0, **arguments):
        config = {"backend": backend, "kv_transfer_timeout_ms": timeout_ms}
        if mtp:
            from tensorrt_llm.llmapi import llm_args

            arguments["speculative_config"] = llm_args.MTPDecodingConfig(num_nextn_predict_layers=mtp)
        return make_llm(cache_transceiver_config=config, disable_overlap_scheduler=True, **arguments)

    return make


@pytest.fixture
def prefill(trtllm, sampling):
    """Prefills and gives the result; what decode gets is `handed_over` of it."""

    async def run(llm, prompt=PROMPT, **fields):
        params = trtllm.DisaggregatedParams(request_type="context_only")
        return await llm.generate_async(prompt, sampling(ignore_eos=True, **fields), disaggregated_params=params)

    return run


def handed_over(result, **changes):
    return dataclasses.replace(result.outputs[0].disaggregated_params, request_type="generation_only", **changes)


async def until_free(llm) -> None:
    async with asyncio.timeout(5):
        while llm._engine.pools[0].used_blocks:  # noqa: ASYNC110 - another thread frees them
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("mtp", [0, 2])
async def test_decode_says_what_one_worker_says(make_worker, prefill, sampling, violations, mtp):
    alone, context, generation = (make_worker(mtp=mtp) for _ in range(3))
    whole = (await alone.generate_async(PROMPT, sampling(ignore_eos=True))).outputs[0].token_ids
    first = await prefill(context)
    assert (first.outputs[0].finish_reason, first.outputs[0].token_ids) == ("not_finished", whole[:1])
    params = handed_over(first)
    assert (params.first_gen_tokens, params.ctx_request_id) == (whole[:1], 1)
    assert len(params.draft_tokens or []) == mtp
    result = await generation.generate_async(PROMPT, sampling(ignore_eos=True), disaggregated_params=params)
    assert result.outputs[0].token_ids == whole
    await until_free(context)
    first.abort()
    assert violations() == []


async def test_between_processes(make_worker, prefill, sampling, model_folder):
    context = make_worker()
    whole = (await context.generate_async(PROMPT, sampling(ignore_eos=True))).outputs[0].token_ids
    context = make_worker(kv={"tokens_per_block": 32})
    params = dataclasses.asdict((await prefill(context)).outputs[0].disaggregated_params)
    params["opaque_state"] = base64.b64encode(params["opaque_state"]).decode()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DECODE, json.dumps([str(model_folder), PROMPT, params])),
        env=os.environ | {"PYTHONPATH": str(CONTRACT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert json.loads(output) == whole
    await until_free(context)


@pytest.mark.parametrize(("excluded", "num_given", "num_in_diffs"), [("0", 8, 8), ("1", 7, 7), ("hidden", 8, 7)])
async def test_what_a_stream_begins_with(
    make_worker, prefill, sampling, monkeypatch, excluded, num_given, num_in_diffs
):
    whole = (await make_worker().generate_async(PROMPT, sampling(ignore_eos=True))).outputs[0].token_ids
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_EXCLUDE_FIRST_TOKENS", excluded)
    params = handed_over(await prefill(make_worker()))
    result = make_worker().generate_async(
        PROMPT, sampling(ignore_eos=True), streaming=True, disaggregated_params=params
    )
    assert [token async for step in result for token in step.outputs[0].token_ids_diff] == whole[-num_in_diffs:]
    assert result.outputs[0].token_ids == whole[-num_given:]


async def test_ids_of_64_bits_and_the_global_one(import_trtllm, monkeypatch, model_folder):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_FIRST_REQUEST_ID", str(2**64 - 9))
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_WITH", "DisaggregatedParams.disagg_request_id")
    trtllm = import_trtllm()
    config = {"backend": "UCX", "kv_transfer_timeout_ms": 60_000}
    llm = trtllm.LLM(
        str(model_folder), skip_tokenizer_init=True, cache_transceiver_config=config, disable_overlap_scheduler=True
    )

    async def run(params):
        sampling = trtllm.SamplingParams(end_id=2, max_tokens=4, ignore_eos=True)
        return (await llm.generate_async(PROMPT, sampling, disaggregated_params=params)).outputs[0]

    params = (await run(trtllm.DisaggregatedParams(request_type="context_only"))).disaggregated_params
    assert params.ctx_request_id == 2**64 - 9 and params.disagg_request_id >= 2**63
    forgotten = dataclasses.replace(params, request_type="generation_only", disagg_request_id=None)
    with pytest.raises(RuntimeError, match="disagg_request_id"):
        await run(forgotten)
    assert len((await run(dataclasses.replace(params, request_type="generation_only"))).token_ids) == 4
    llm.shutdown()


async def test_a_prefill_that_ends_is_complete(make_worker, prefill, sampling, monkeypatch, trtllm):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "0")
    context = make_worker()
    params = trtllm.DisaggregatedParams(request_type="context_only")
    output = (await context.generate_async(PROMPT, sampling(), disaggregated_params=params)).outputs[0]
    assert (output.finish_reason, output.token_ids, output.disaggregated_params) == ("stop", [2], None)
    await until_free(context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opaque_state": "text"}, "not bytes"),
        ({"opaque_state": bytearray(b"x")}, "not bytes"),
        ({"ctx_request_id": 1.0}, "64-bit int"),
        ({"ctx_request_id": None}, "64-bit int"),
        ({"first_gen_tokens": (5,)}, "list of ints"),
        ({"ctx_request_id": 7}, "two requests"),
        ({"draft_tokens": [1]}, "draft_tokens"),
        ({"first_gen_tokens": [5]}, "first_gen_tokens"),
    ],
)
async def test_wrong_parameters(make_worker, prefill, sampling, violations, changes, message):
    params = handed_over(await prefill(make_worker()), **changes)
    with pytest.raises(RuntimeError, match=message):
        await make_worker().generate_async(PROMPT, sampling(ignore_eos=True), disaggregated_params=params)
    assert len(violations()) == 1


async def test_another_prompt_is_a_violation(make_worker, prefill, sampling, violations):
    params = handed_over(await prefill(make_worker()))
    with pytest.raises(RuntimeError, match="another prompt"):
        await make_worker().generate_async([*PROMPT, 11], sampling(), disaggregated_params=params)
    assert "another prompt" in violations()[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"backend": "NIXL"}, "backend"),
        ({"kv": {"tokens_per_block": 8}}, "tokens_per_block"),
        ({"kv": {"dtype": "fp8"}}, "dtype"),
        ({"mtp": 1}, "draft_tokens"),
    ],
)
async def test_both_sides_are_alike(make_worker, prefill, sampling, other, message):
    from tensorrt_llm.executor import RequestError

    params = handed_over(await prefill(make_worker()))
    with pytest.raises(RequestError, match=message):
        await make_worker(**other).generate_async(PROMPT, sampling(), disaggregated_params=params)


async def test_no_abort_while_the_kv_is_on_its_way(make_worker, prefill, violations):
    context = make_worker()
    result = await prefill(context)
    with pytest.raises(RuntimeError, match="in flight"):
        result.abort()
    assert not context._check_health()
    assert "in flight" in violations()[0]


async def test_kv_that_nobody_pulls_is_given_up(make_worker, prefill, sampling):
    from tensorrt_llm.executor import RequestError

    context = make_worker(timeout_ms=50)
    result = await prefill(context)
    await until_free(context)
    with pytest.raises(RequestError, match="no such KV"):
        await make_worker().generate_async(PROMPT, sampling(), disaggregated_params=handed_over(result))


async def test_transfers_that_fail_or_are_slow(make_worker, prefill, sampling, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_TRANSFER_FAILURES", "1")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_TRANSFER_MS", "100")
    context, generation = make_worker(), make_worker()
    params = handed_over(await prefill(context))
    with pytest.raises(RuntimeError, match="transfer fails"):
        await generation.generate_async(PROMPT, sampling(), disaggregated_params=params)
    started = asyncio.get_running_loop().time()
    await generation.generate_async(PROMPT, sampling(), disaggregated_params=dataclasses.replace(params))
    assert asyncio.get_running_loop().time() - started >= 0.1
    context.shutdown()
    with pytest.raises(RuntimeError, match="cannot be reached"):
        await generation.generate_async(PROMPT, sampling(), disaggregated_params=params)


async def test_configurations_that_cannot_prefill(trtllm, make_llm, make_worker, sampling):
    params = trtllm.DisaggregatedParams(request_type="Context_Only")
    assert params.request_type == "context_only"
    with pytest.raises(RuntimeError, match="disable_overlap_scheduler"):
        make_llm(cache_transceiver_config={"backend": "UCX"}).generate_async(
            PROMPT, sampling(), disaggregated_params=params
        )
    with pytest.raises(RuntimeError, match="backend is None"):
        make_llm(disable_overlap_scheduler=True, cache_transceiver_config={}).generate_async(
            PROMPT, sampling(), disaggregated_params=params
        )
    config = {"backend": "UCX", "max_tokens_in_buffer": 4}
    for more, message in (({}, "kv_transfer_timeout_ms"), ({"kv_transfer_timeout_ms": 9}, "max_tokens_in_buffer is 4")):
        llm = make_llm(disable_overlap_scheduler=True, cache_transceiver_config=config | more)
        with pytest.raises(RuntimeError, match=message):
            llm.generate_async(PROMPT, sampling(), disaggregated_params=params)
    with pytest.raises(RuntimeError, match="n = 2"):
        make_worker().generate_async(PROMPT, sampling(n=2, temperature=1.0), disaggregated_params=params)
