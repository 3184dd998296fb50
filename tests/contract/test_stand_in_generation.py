"""One request after the other: what a result shows, when it ends, which calls break a rule."""

from __future__ import annotations

import asyncio
from array import array

import pytest

PROMPT = [5, 6, 7, 8, 9, 10]


async def streamed(result):
    """(new tokens, finish reason) of each step of a request with one sequence."""
    return [(step.outputs[0].token_ids_diff, step.outputs[0].finish_reason) async for step in result]


async def test_a_stream_is_one_object_that_grows(make_llm, sampling, violations):
    llm = make_llm()
    result = llm.generate_async(PROMPT, sampling(ignore_eos=True), streaming=True)
    seen = []
    async for step in result:
        assert step is result
        seen.append(list(step.outputs[0].token_ids))
    whole = await llm.generate_async(PROMPT, sampling(ignore_eos=True))
    assert [len(tokens) for tokens in seen] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert seen[-1] == whole.outputs[0].token_ids
    assert whole.finished and whole.outputs[0].finish_reason == "length"
    assert (result.cached_tokens, whole.cached_tokens) == (0, 5)
    assert violations() == []


async def test_another_prompt_goes_on_where_one_ended(make_llm, sampling):
    llm = make_llm()
    first = (await llm.generate_async(PROMPT, sampling(max_tokens=4, ignore_eos=True))).outputs[0].token_ids
    whole = (await llm.generate_async(PROMPT, sampling(ignore_eos=True))).outputs[0].token_ids
    rest = await llm.generate_async(PROMPT + first, sampling(max_tokens=4, ignore_eos=True))
    assert first + rest.outputs[0].token_ids == whole


async def test_a_slow_reader_gets_every_step(make_llm, sampling):
    llm = make_llm()
    result = llm.generate_async(PROMPT, sampling(ignore_eos=True), streaming=True)
    await asyncio.sleep(0.1)
    assert [len(new) for new, _ in await streamed(result)] == [1] * 8


async def test_steps_of_several_tokens(trtllm, make_llm, sampling):
    from tensorrt_llm.llmapi.llm_args import MTPDecodingConfig

    plain = await make_llm().generate_async(PROMPT, sampling(max_tokens=30, ignore_eos=True))
    drafting = make_llm(speculative_config=MTPDecodingConfig(num_nextn_predict_layers=3))
    steps = await streamed(drafting.generate_async(PROMPT, sampling(max_tokens=30, ignore_eos=True), streaming=True))
    assert [token for new, _ in steps for token in new] == plain.outputs[0].token_ids
    assert max(len(new) for new, _ in steps) > 1
    seldom = make_llm(stream_interval=4)
    steps = await streamed(seldom.generate_async(PROMPT, sampling(max_tokens=10, ignore_eos=True), streaming=True))
    assert [len(new) for new, _ in steps] == [1, 3, 4, 2]


async def test_ends(make_llm, sampling, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "3")
    llm = make_llm()
    output = (await llm.generate_async(PROMPT, sampling())).outputs[0]
    assert (output.token_ids[-1], len(output.token_ids)) == (2, 4)
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert len((await llm.generate_async(PROMPT, sampling(min_tokens=6))).outputs[0].token_ids) == 7
    stop = output.token_ids[1]
    stopped = (await llm.generate_async(PROMPT, sampling(stop_token_ids=[stop]))).outputs[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (output.token_ids[:1], "stop", stop)
    kept = sampling(stop_token_ids=[stop], include_stop_str_in_output=True)
    assert (await llm.generate_async(PROMPT, kept)).outputs[0].token_ids == output.token_ids[:2]


async def test_several_sequences_and_their_traps(make_llm, sampling, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_LENGTH", "natural")
    llm = make_llm()
    result = llm.generate_async(PROMPT, sampling(n=3, temperature=1.0, max_tokens=5, ignore_eos=True), streaming=True)
    by_diffs = 0
    async for step in result:
        by_diffs += sum(len(output.token_ids_diff) for output in step.outputs)
    lengths = [len(output.token_ids) for output in result.outputs]
    assert lengths == [5, 5, 5]
    assert by_diffs > sum(lengths)  # the others' old deltas are seen again
    assert len({tuple(output.token_ids) for output in result.outputs}) == 3
    assert [output.finish_reason for output in result.outputs] == [None, None, "length"]


async def test_logprobs(make_llm, sampling):
    llm = make_llm()
    output = (await llm.generate_async(PROMPT, sampling(logprobs=3, prompt_logprobs=1))).outputs[0]
    assert [next(iter(entry)) for entry in output.logprobs] == output.token_ids
    assert all([logprob.rank for logprob in entry.values()] == [1, 2, 3] for entry in output.logprobs)
    assert len(output.prompt_logprobs) == len(PROMPT)
    assert (await llm.generate_async(PROMPT, sampling(logprobs=0))).outputs[0].logprobs == []


async def test_an_embedding_bias_is_followed(make_llm, sampling, violations, trtllm):
    llm = make_llm()
    bias = array("f", [0.0]) * 1000
    bias[77] = 100.0
    output = (await llm.generate_async(PROMPT, sampling(embedding_bias=bias, max_tokens=3))).outputs[0]
    assert output.token_ids == [77, 77, 77]
    with pytest.raises(RuntimeError, match="embedding_bias has shape"):
        llm.generate_async(PROMPT, sampling(embedding_bias=bias[:5]))
    assert len(violations()) == 1


async def test_abort(make_llm, sampling, violations):
    llm = make_llm()
    result = llm.generate_async(PROMPT, sampling(max_tokens=4000, ignore_eos=True), streaming=True)
    async for _ in result:
        if not result.aborted():
            result.abort()
    assert result.finished and result.outputs[0].finish_reason == "cancelled"
    result.abort()
    assert (await llm.generate_async(PROMPT, sampling())).finished
    assert violations() == []


async def test_one_request_fails_or_all(trtllm, make_llm, sampling, monkeypatch):
    from tensorrt_llm.executor.utils import RequestError

    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_REQUEST_ERROR_TOKEN", "98")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_FATAL_ERROR_TOKEN", "99")
    llm = make_llm()
    with pytest.raises(RequestError):
        await llm.generate_async([98], sampling())
    assert (await llm.generate_async(PROMPT, sampling())).finished and llm._check_health()
    other = llm.generate_async(PROMPT, sampling(max_tokens=4000, ignore_eos=True))
    for lost in (llm.generate_async([99], sampling()), other):
        with pytest.raises(RuntimeError) as error:
            await lost
        assert not isinstance(error.value, RequestError)
    assert not llm._check_health()
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async(PROMPT, sampling())


async def test_more_requests_than_blocks_wait(make_llm, sampling):
    llm = make_llm(kv={"max_tokens": 16})
    results = [llm.generate_async([i, *PROMPT], sampling(ignore_eos=True)) for i in range(3, 7)]
    assert all([len((await result).outputs[0].token_ids) == 8 for result in results])
    with pytest.raises(RuntimeError, match="needs 5 KV blocks of 4"):
        await llm.generate_async(PROMPT, sampling(max_tokens=12))


async def test_perf_metrics(trtllm, make_llm, sampling):
    from tensorrt_llm.llmapi.llm_args import MTPDecodingConfig

    llm = make_llm(speculative_config=MTPDecodingConfig(num_nextn_predict_layers=3), return_perf_metrics=True)
    result = await llm.generate_async(PROMPT, sampling(max_tokens=60, ignore_eos=True))
    assert 1 < result.avg_decoded_tokens_per_iter < 4
    metrics = result.outputs[0].request_perf_metrics
    assert 0 < metrics.speculative_decoding.acceptance_rate < 1
    stamps = metrics.timing_metrics
    assert stamps.arrival_time.total_seconds() <= stamps.first_token_time.total_seconds()
