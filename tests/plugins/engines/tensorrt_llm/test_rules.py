"""Contradictions that the sources name, one clear sentence each, and the right arguments beside the wrong ones."""

from __future__ import annotations

import pytest

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm.arguments import ArgumentsError, llm_arguments
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.engines.tensorrt_llm.rules import check_roles

MTP = {"decoding_type": "MTP", "num_nextn_predict_layers": 1}


WIDE = {"tensor_parallel_size": 16, "moe_expert_parallel_size": 16, "enable_attention_dp": True}
LONG = {"max_seq_len": 4096}
GRAPHS = {"speculative_config": MTP, "cuda_graph_config": {"batch_sizes": [256]}}


def arguments(role=Role.AGG, options=None, settings=None, **llm_args):
    config = EngineConfig("/m", role, **({"block_size": 32} | (settings or {})))
    return llm_arguments(config, TensorRTLLMOptions(llm_args=llm_args, **(options or {})))


REFUSED = [
    (dict(settings={"device": "cpu"}), "--device cpu is not for TensorRT-LLM", dict(settings={"device": "cuda"})),
    (dict(settings={"device": "cuda:3"}), "give --gpus 3 instead", {}),
    (dict(kv_cache_config={"tokens_per_block": 64}), "is not --block-size 32", {}),
    (dict(settings={"block_size": 48}), "--block-size 48 is not a power of 2", dict(settings={"block_size": 64})),
    (
        dict(settings={"max_num_tokens": 511, "max_num_seqs": 256}, **GRAPHS),
        "max_num_tokens 511 is below 512",
        dict(settings={"max_num_tokens": 512, "max_num_seqs": 256}, **GRAPHS),
    ),
    (
        dict(settings={"max_num_tokens": 100, "max_num_seqs": 999}, speculative_config=MTP),
        "max_num_tokens 100 is below 256",
        dict(settings={"max_num_tokens": 100, "max_num_seqs": 50}, speculative_config=MTP),
    ),
    (
        dict(settings={"max_num_tokens": 100, "max_num_seqs": 999}, speculative_config=MTP),
        "max_num_tokens 100 is below 256",
        dict(settings={"max_num_tokens": 100}, speculative_config=MTP, cuda_graph_config=None),
    ),
    (
        dict(cuda_graph_config={"batch_sizes": [1, 8], "max_batch_size": 16}),
        "max_batch_size 16 is not the largest of its batch_sizes, 8",
        dict(cuda_graph_config={"batch_sizes": [1, 8], "max_batch_size": 8}),
    ),
    (
        dict(role=Role.PREFILL, disable_overlap_scheduler=False),
        "disable_overlap_scheduler must be true on prefill workers",
        dict(role=Role.DECODE, disable_overlap_scheduler=False),
    ),
    (
        dict(kv_cache_config={"enable_block_reuse": False, "event_buffer_max_size": 5}),
        "no KV events without enable_block_reuse",
        dict(kv_cache_config={"enable_block_reuse": True, "event_buffer_max_size": 5}),
    ),
    (
        dict(role=Role.DECODE, cache_transceiver_config={"backend": None}),
        "turns transfers off",
        dict(role=Role.DECODE, cache_transceiver_config={"backend": "NIXL"}),
    ),
    (dict(role=Role.DECODE, options={"transceiver_backend": "MPI"}), "needs all workers in one MPI world", {}),
    (
        dict(role=Role.DECODE, settings={"transfer": "shm"}),
        "KV cannot move by shm between TensorRT-LLM engines",
        dict(settings={"transfer": "shm"}),
    ),
    (
        dict(role=Role.PREFILL, settings=LONG, cache_transceiver_config={"max_tokens_in_buffer": 4094}),
        "max_tokens_in_buffer 4094 does not hold the longest prompt, 4095 tokens",
        dict(role=Role.PREFILL, settings=LONG, cache_transceiver_config={"max_tokens_in_buffer": 4095}),
    ),
    (dict(max_beam_width=2), "trtserve has no beam search", dict(max_beam_width=1)),
    (
        dict(options={"tensor_parallel_size": 4, "moe_expert_parallel_size": 3}),
        "moe_expert_parallel_size 3 must divide tensor_parallel_size, which is 4",
        dict(options={"tensor_parallel_size": 4, "moe_expert_parallel_size": 2}),
    ),
    (
        dict(options={"tensor_parallel_size": 8, "moe_expert_parallel_size": 2}, moe_tensor_parallel_size=2),
        "must be tensor_parallel_size, which is 8",
        dict(options={"tensor_parallel_size": 8, "moe_expert_parallel_size": 2}, moe_tensor_parallel_size=4),
    ),
    (
        dict(options={"tensor_parallel_size": 12, "gpus_per_node": 8}),
        "12 GPUs are no whole number of nodes",
        dict(options={"tensor_parallel_size": 16, "gpus_per_node": 8}),
    ),
    (
        dict(enable_lm_head_tp_in_adp=True),
        "enable_lm_head_tp_in_adp without enable_attention_dp",
        dict(enable_lm_head_tp_in_adp=True, options={"enable_attention_dp": True}),
    ),
    (
        dict(options={"single_process": True, "tensor_parallel_size": 2}),
        "single_process is for one GPU",
        dict(options={"single_process": True}),
    ),
    (dict(speculative_config={"decoding_type": "Medusa"}), "not in the PyTorch backend", {}),
    (
        dict(speculative_config={"decoding_type": "Eagle3", "max_draft_len": 3}),
        "the draft model's folder or hub id is needed",
        dict(speculative_config={"decoding_type": "Eagle3", "max_draft_len": 3, "speculative_model": "d"}),
    ),
    (dict(max_num_tokens="many"), "max_num_tokens: 'many' is not a whole number above 0", {}),
    (dict(cuda_graph_config={"batch_sizes": "1,2"}), "is not a list of whole numbers", {}),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words", "right"), REFUSED, ids=[words[:40] for _, words, _ in REFUSED])
def test_contradictions_are_refused(wrong, words, right):
    with pytest.raises(ArgumentsError) as caught:
        arguments(**wrong)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1
    arguments(**right)


NOTED = [
    (dict(role=Role.PREFILL, attn_backend="FLASHINFER"), "#6507", dict(attn_backend="FLASHINFER")),
    (dict(role=Role.DECODE), "#12542", dict(role=Role.DECODE, settings={"enable_prefix_caching": False})),
    (
        dict(role=Role.DECODE, cache_transceiver_config={"kv_transfer_timeout_ms": None}),
        "#12476",
        dict(role=Role.DECODE),
    ),
    (dict(role=Role.PREFILL, pipeline_parallel_size=2), "#17124", dict(pipeline_parallel_size=2)),
    (dict(speculative_config=MTP), "ignore_eos", {}),
    (
        dict(speculative_config=MTP),
        "accepts greedily",
        dict(speculative_config={**MTP, "allow_advanced_sampling": True}),
    ),
    (dict(speculative_config=MTP), "#16101", dict(speculative_config=MTP, disable_overlap_scheduler=True)),
    ({}, "no guided_decoding_backend", dict(guided_decoding_backend="xgrammar")),
    (dict(options={"enable_chunked_prefill": False}), "no chunked prefill", {}),
    (
        dict(settings={"max_seq_len": 9000}, enable_chunked_prefill=False),
        "prompts are refused above max_num_tokens 8192, though max_seq_len is 9000",
        dict(settings={"max_seq_len": 8192}, enable_chunked_prefill=False),
    ),
    (
        dict(options=WIDE, settings={"max_num_seqs": 256}, moe_config={"max_num_tokens": 4095}),
        "moe_config.max_num_tokens 4095 is below max_batch_size × moe_expert_parallel_size, 4096",
        dict(options=WIDE, settings={"max_num_seqs": 256}, moe_config={"max_num_tokens": 4096}),
    ),
    (dict(enable_iter_perf_stats=False), "enable_iter_perf_stats is off", {}),
]  # fmt: skip


@pytest.mark.parametrize(("risky", "words", "safe"), NOTED, ids=[words[:30] for _, words, _ in NOTED])
def test_risks_are_noted(risky, words, safe):
    assert any(words in note for note in arguments(**risky).notes)
    assert not any(words in note for note in arguments(**safe).notes)


def pair(prefill=None, decode=None, settings=None):
    return {
        role: arguments(role=role, settings=settings, **(llm_args or {})).merged()
        for role, llm_args in ((Role.PREFILL, prefill), (Role.DECODE, decode))
    }


def test_roles_that_go_together():
    assert check_roles(pair()) == []
    assert check_roles({Role.AGG: arguments().merged()}) == []


@pytest.mark.parametrize(
    ("prefill", "decode", "words"),
    [
        ({"kv_cache_config": {"dtype": "fp8"}}, {}, "kv_cache_config.dtype: 'fp8' for prefill and 'auto' for decode"),
        ({}, {"cache_transceiver_config": {"backend": "NIXL"}}, "cache_transceiver_config.backend: 'UCX' for prefill"),
        ({"speculative_config": MTP}, {}, "speculative_config.decoding_type: 'MTP' for prefill"),
        (
            {"speculative_config": MTP},
            {"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 3}},
            "draft length: 1 for prefill and 3 for decode",
        ),
        ({"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}, "#14020"),
        (
            {"max_seq_len": 4096},
            {"max_seq_len": 8192, "cache_transceiver_config": {"max_tokens_in_buffer": 2048}},
            "max_tokens_in_buffer 2048 of decode does not hold the longest prompt, 4095 tokens",
        ),
    ],
)
def test_roles_that_do_not(prefill, decode, words):
    assert any(words in problem for problem in check_roles(pair(prefill, decode)))
