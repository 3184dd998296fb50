"""Files for TensorRT-LLM 0.19 to 1.1 in the names of 1.2."""

from __future__ import annotations

import copy

import pytest

from trtserve.plugins.engines.tensorrt_llm.old_names import in_new_names

TABLE = [
    ({"pytorch_backend_config": {"print_iter_log": True}}, {"print_iter_log": True}),
    ({"enable_overlap_scheduler": True}, {"disable_overlap_scheduler": False}),
    ({"enable_overlap_scheduler": False}, {"disable_overlap_scheduler": True}),
    ({"use_cuda_graph": True}, {"cuda_graph_config": {}}),
    ({"use_cuda_graph": False, "cuda_graph_batch_sizes": [1]}, {"cuda_graph_config": None}),
    (
        {"use_cuda_graph": True, "cuda_graph_batch_sizes": [1, 2], "cuda_graph_padding_enabled": True},
        {"cuda_graph_config": {"batch_sizes": [1, 2], "enable_padding": True}},
    ),
    ({"cuda_graph_max_batch_size": 8}, {"cuda_graph_config": {"max_batch_size": 8}}),
    ({"kv_cache_dtype": "fp8"}, {"kv_cache_config": {"dtype": "fp8"}}),
    (
        {"free_gpu_memory_fraction": 0.4, "kv_cache_config": {"dtype": "fp8"}},
        {"kv_cache_config": {"free_gpu_memory_fraction": 0.4, "dtype": "fp8"}},
    ),
    (
        {"moe_backend": "WideEP", "moe_max_num_tokens": 9, "moe_load_balancer": "/eplb.yaml"},
        {"moe_config": {"backend": "WIDEEP", "max_num_tokens": 9, "load_balancer": "/eplb.yaml"}},
    ),
    ({"enable_trtllm_sampler": True}, {"sampler_type": "TRTLLMSampler"}),
    ({"tp_size": 4, "ep_size": 2}, {"tensor_parallel_size": 4, "moe_expert_parallel_size": 2}),
    (
        {"speculative_config": {"decoding_type": "Eagle", "num_nextn_predict_layers": 3, "pytorch_weights_path": "d"}},
        {"speculative_config": {"decoding_type": "Eagle", "max_draft_len": 3, "speculative_model": "d"}},
    ),
    (
        {"speculative_config": {"decoding_type": "MTP", "BEGIN_THINKING_PHASE_TOKEN": 5}},
        {"speculative_config": {"decoding_type": "MTP", "begin_thinking_phase_token": 5}},
    ),
    ({"disagg_cluster": {"cluster_uri": "http://x"}}, {}),
    ({"build_config": {}}, {}),
]


@pytest.mark.parametrize(("old", "new"), TABLE)
def test_each_change_is_made_and_told(old, new):
    before = copy.deepcopy(old)
    arguments, notes = in_new_names(old)
    assert arguments == new
    assert notes and old == before


def test_a_new_name_comes_before_its_old_one():
    given = {"kv_cache_dtype": "auto", "kv_cache_config": {"dtype": "fp8"}, "tp_size": 1, "tensor_parallel_size": 2}
    assert in_new_names(given)[0] == {"kv_cache_config": {"dtype": "fp8"}, "tensor_parallel_size": 2}


def test_new_names_stay_and_leave_no_note():
    given = {"cuda_graph_config": None, "kv_cache_config": {"dtype": "fp8"}, "backend": "pytorch"}
    assert in_new_names(given) == ({"cuda_graph_config": None, "kv_cache_config": {"dtype": "fp8"}}, [])


def test_case_that_was_free_once():
    arguments, _ = in_new_names(
        {"cache_transceiver_config": {"backend": "default"}, "moe_config": {"backend": "wideep"}}
    )
    assert arguments == {"cache_transceiver_config": {"backend": "DEFAULT"}, "moe_config": {"backend": "WIDEEP"}}
