"""The LLM's arguments: unknown names are refused wherever they stand, and a YAML file is merged key by key."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError


def test_a_wrong_name_is_refused(trtllm, make_llm):
    with pytest.raises(ValueError, match="LLM got invalid argument: enable_overlap_scheduler"):
        make_llm(enable_overlap_scheduler=True)
    with pytest.raises(ValidationError, match="dtpe"):
        make_llm(kv={"dtpe": "fp8"})
    with pytest.raises(ValidationError, match="backend"):
        make_llm(cache_transceiver_config={"backend": "ucx"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cuda_graph_config": {"batch_sizes": [1, 2], "max_batch_size": 4}}, "max_batch_size"),
        ({"cache_transceiver_config": {"backend": "UCX", "kv_transfer_timeout_ms": 0}}, "greater than 0"),
        ({"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 1}}, "decoding_type"),
        ({"stream_interval": 0}, "greater than 0"),
        ({"load_format": "fast"}, "Invalid LoadFormat"),
    ],
)
def test_a_wrong_value_is_refused(make_llm, arguments, message):
    with pytest.raises(ValidationError, match=message):
        make_llm(**arguments)


def test_a_yaml_file_is_merged_key_by_key(trtllm):
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

    extra = {"speculative_config": {"decoding_type": "MTP", "num_nextn_predict_layers": 3}, "kv_cache_config": {}}
    merged = update_llm_args_with_extra_dict({"max_batch_size": 4, "kv_cache_config": {"dtype": "fp8"}}, extra)
    assert merged["speculative_config"].max_draft_len == 3
    assert merged["kv_cache_config"] == {}
    assert merged["max_batch_size"] == 4
    assert extra["speculative_config"] is merged["speculative_config"]


def test_a_later_version_merges_the_kv_cache_and_takes_a_raw_speculation(import_trtllm, monkeypatch):
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_ARGUMENTS", "1.3")
    import_trtllm()
    from tensorrt_llm.llmapi.llm_args import TorchLlmArgs, update_llm_args_with_extra_dict

    speculation = {"decoding_type": "MTP", "num_nextn_predict_layers": 2}
    extra = {"kv_cache_config": {"dtype": "fp8"}, "speculative_config": speculation}
    merged = update_llm_args_with_extra_dict({"kv_cache_config": {"tokens_per_block": 64}}, extra)
    assert (merged["kv_cache_config"].dtype, merged["kv_cache_config"].tokens_per_block) == ("fp8", 64)
    assert merged["speculative_config"] == speculation
    assert TorchLlmArgs(model="m", **merged).speculative_config.max_draft_len == 2


def test_arguments_are_filled_from_the_model(make_llm):
    args = make_llm(max_num_tokens=128).args
    assert (args.max_num_tokens, args.max_batch_size, args.max_seq_len) == (128, 2048, 4096)
    assert args.kv_cache_config.tokens_per_block == 4
    assert args.parallel_config.world_size == 1


def test_too_few_gpus(make_llm, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    make_llm(tensor_parallel_size=2)
    with pytest.raises(RuntimeError, match="Only 2 GPUs"):
        make_llm(tensor_parallel_size=4)


async def test_after_shutdown(make_llm, sampling):
    llm = make_llm()
    assert llm._check_health()
    with pytest.raises(RuntimeError, match="pickled"):
        pickle.dumps(llm)
    llm.shutdown()
    llm.shutdown()
    assert not llm._check_health()
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async([5], sampling())


def test_other_versions(import_trtllm, monkeypatch):
    import inspect

    from_later = "DisaggregatedParams.disagg_request_id,generate_async.priority"
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_VERSION", "1.3.0rc1")
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_WITH", from_later)
    monkeypatch.setenv(
        "TENSORRT_LLM_STAND_IN_WITHOUT",
        "generate_async.cache_salt,CacheTransceiverConfig.kv_transfer_timeout_ms,TorchLlmArgs.stream_interval",
    )
    trtllm = import_trtllm()
    assert trtllm.__version__ == "1.3.0rc1"
    keywords = inspect.signature(trtllm.LLM.generate_async).parameters
    assert "priority" in keywords and "cache_salt" not in keywords
    assert trtllm.DisaggregatedParams(disagg_request_id=7).disagg_request_id == 7
    from tensorrt_llm.llmapi import CacheTransceiverConfig, TorchLlmArgs

    assert "stream_interval" not in TorchLlmArgs.model_fields
    with pytest.raises(ValidationError):
        CacheTransceiverConfig(backend="UCX", kv_transfer_timeout_ms=5)
