"""Each broken rule is raised where it is broken, and written down."""

from __future__ import annotations

import pytest

PROMPT = [5, 6, 7]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"end_id": None}, ValueError, "end_id"),
        ({"stop": ["x"]}, RuntimeError, "not processed by tokenizer"),
        ({"max_tokens": None}, RuntimeError, "max_tokens is None"),
        ({"max_tokens": 0}, RuntimeError, "max_tokens is 0"),
    ],
)
async def test_sampling_at_submission(make_llm, sampling, violations, fields, error, message):
    with pytest.raises(error, match=message):
        make_llm().generate_async(PROMPT, sampling(**fields))
    assert len(violations()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": -1}, "top_k >= 0"),
        ({"top_p": 1.5}, "top_p <= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"n": 2}, "Greedy decoding"),
        ({"n": 2, "temperature": 0.0}, "Greedy decoding"),
        ({"n": 3, "best_of": 2, "temperature": 1.0}, "less than n"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_sampling_values(sampling, violations, fields, message):
    with pytest.raises(ValueError, match=message):
        sampling(**fields)
    assert len(violations()) == 1


def test_sampling_names(sampling):
    with pytest.raises(TypeError, match="logit_bias"):
        sampling(logit_bias={})


@pytest.mark.parametrize("guides", [{}, {"regex": "a", "json_object": True}, {"json": {"name": "a", "schema": {}}}])
def test_guides(trtllm, sampling, violations, guides):
    with pytest.raises(ValueError, match=r"guide"):
        sampling(guided_decoding=trtllm.GuidedDecodingParams(**guides))
    assert len(violations()) == 1


async def test_guides_need_a_backend(trtllm, make_llm, sampling):
    def guided():
        return sampling(guided_decoding=trtllm.GuidedDecodingParams(regex="a"))

    with pytest.raises(RuntimeError, match="guided_decoding_backend is None"):
        await make_llm().generate_async(PROMPT, guided())
    assert (await make_llm(guided_decoding_backend="xgrammar").generate_async(PROMPT, guided())).finished


async def test_a_sampling_object_serves_one_request(make_llm, sampling, violations):
    llm, once = make_llm(), sampling()
    await llm.generate_async(PROMPT, once)
    with pytest.raises(RuntimeError, match="second time"):
        llm.generate_async(PROMPT, once)
    assert len(violations()) == 1


@pytest.mark.parametrize("prompt", [(5, 6), [], [5.0], [True], [1000], "text", {"prompt_ids": [5]}])
async def test_prompts(make_llm, sampling, prompt):
    with pytest.raises((RuntimeError, NotImplementedError)):
        make_llm().generate_async(prompt, sampling())


async def test_long_prompts_need_chunks(make_llm, sampling):
    with pytest.raises(ValueError, match="max_num_tokens"):
        make_llm(max_num_tokens=16).generate_async([5] * 17, sampling())
    chunked = make_llm(max_num_tokens=16, enable_chunked_prefill=True)
    assert (await chunked.generate_async([5] * 100, sampling())).finished
    with pytest.raises(RuntimeError, match="max_seq_len"):
        await chunked.generate_async([5] * 4096, sampling())


def test_a_result_made_outside_of_a_loop_cannot_be_awaited(make_llm, sampling):
    result = make_llm().generate_async(PROMPT, sampling())
    with pytest.raises(AssertionError):
        result.__anext__().send(None)
    assert result.result(timeout=5).finished


async def test_ranks(trtllm, make_llm, sampling, violations):
    llm = make_llm(tensor_parallel_size=2, enable_attention_dp=True)
    for rank in (0, 1, 1):
        hard = trtllm.SchedulingParams(attention_dp_rank=rank, attention_dp_relax=False)
        result = await llm.generate_async([rank, *PROMPT], sampling(), scheduling_params=hard)
    assert result.cached_tokens == 3
    with pytest.raises(RuntimeError, match="of 2 ranks"):
        wrong = trtllm.SchedulingParams(attention_dp_rank=2, attention_dp_relax=False)
        llm.generate_async(PROMPT, sampling(), scheduling_params=wrong)
    with pytest.raises(RuntimeError, match="attention DP is off"):
        make_llm().generate_async(PROMPT, sampling(), scheduling_params=trtllm.SchedulingParams(attention_dp_rank=0))
    assert len(violations()) == 2
