"""Settings and what the user says become the arguments of `tensorrt_llm.LLM`."""

from __future__ import annotations

import copy

import pytest
import yaml

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm import fields
from trtserve.plugins.engines.tensorrt_llm.arguments import ArgumentsError, llm_arguments, merged
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions

AGG = EngineConfig("/models/m", block_size=32)


def made(config=AGG, **options):
    return llm_arguments(config, TensorRTLLMOptions.model_validate(options))


def base(role=Role.AGG, **settings):
    return made(EngineConfig("/models/m", role, **({"block_size": 32} | settings))).base


def test_what_the_settings_say():
    arguments = base(max_num_seqs=7, max_num_tokens=99, max_seq_len=100, num_blocks=10, dtype="bfloat16")
    wanted = {"model": "/models/m", "dtype": "bfloat16", "max_batch_size": 7, "max_num_tokens": 99, "max_seq_len": 100}
    assert wanted.items() <= arguments.items()
    assert arguments["kv_cache_config"]["max_tokens"] == 320
    assert arguments["skip_tokenizer_init"] is True and arguments["enable_iter_perf_stats"] is True


def test_tensorrt_llms_own_defaults_where_nothing_is_said():
    assert base()["max_num_tokens"] == 8192
    assert not {"max_seq_len", "moe_expert_parallel_size", "cache_transceiver_config"} & base().keys()
    assert base(kv_cache_gib=1.5)["kv_cache_config"]["max_gpu_total_bytes"] == 3 * 2**29


def test_every_name_that_we_say_is_known():
    everything = made(
        EngineConfig("/m", Role.PREFILL, block_size=32, num_blocks=1, max_seq_len=64),
        moe_expert_parallel_size=1,
        gpus_per_node=1,
        guided_decoding_backend="xgrammar",
        kv_cache_free_gpu_memory_fraction=0.5,
    ).base
    assert everything.keys() <= fields.LLM
    for name, inner in everything.items():
        if isinstance(inner, dict):
            assert inner.keys() <= fields.NESTED[name]


@pytest.mark.parametrize(("role", "is_off"), [(Role.AGG, None), (Role.PREFILL, True), (Role.DECODE, None)])
def test_roles_differ_in_overlap(role, is_off):
    assert base(role).get("disable_overlap_scheduler") is is_off


@pytest.mark.parametrize(
    ("transfer", "options", "backend"),
    [("auto", {}, "UCX"), ("ucx", {}, "UCX"), ("nixl", {}, "NIXL"), ("ucx", {"transceiver_backend": "nixl"}, "NIXL")],
)
def test_how_kv_moves(transfer, options, backend):
    config = EngineConfig("/m", Role.DECODE, block_size=32, max_seq_len=100, transfer=transfer)
    assert made(config, **options).base["cache_transceiver_config"] == {
        "backend": backend,
        "kv_transfer_timeout_ms": 60_000,
        "max_tokens_in_buffer": 128,
    }


def test_a_users_transceiver_block_keeps_our_backend():
    config = EngineConfig("/m", Role.DECODE, block_size=32)
    extra = made(config, llm_args={"cache_transceiver_config": {"max_tokens_in_buffer": 9999}}).extra
    assert extra["cache_transceiver_config"]["backend"] == "UCX"
    assert extra["cache_transceiver_config"]["max_tokens_in_buffer"] == 9999


def test_guided_decoding_brings_the_tokenizer():
    assert made(guided_decoding_backend="llguidance").base["skip_tokenizer_init"] is False
    assert made(llm_args={"guided_decoding_backend": "xgrammar"}).base["skip_tokenizer_init"] is False


@pytest.mark.parametrize("how", ["setting", "argument"])
def test_no_events_without_reuse(how):
    if how == "setting":
        cache = base(enable_prefix_caching=False)["kv_cache_config"]
    else:
        cache = made(llm_args={"kv_cache_config": {"enable_block_reuse": False}}).merged()["kv_cache_config"]
    assert (cache["enable_block_reuse"], cache["event_buffer_max_size"]) == (False, 0)


def test_merging_is_shallow_but_for_the_kv_cache():
    below = {"a": 1, "moe_config": {"backend": "X"}, "kv_cache_config": {"dtype": "auto", "tokens_per_block": 32}}
    above = {"moe_config": {"max_num_tokens": 1}, "kv_cache_config": {"dtype": "fp8"}}
    before = copy.deepcopy((below, above))
    assert merged(below, above) == {
        "a": 1,
        "moe_config": {"max_num_tokens": 1},
        "kv_cache_config": {"dtype": "fp8", "tokens_per_block": 32},
    }
    assert (below, above) == before


def test_versions_that_merge_blocks_and_those_that_replace_them_make_the_same():
    decode = EngineConfig("/models/m", Role.DECODE, block_size=32)
    arguments = made(decode, llm_args={"kv_cache_config": {"dtype": "fp8"}, "cache_transceiver_config": {}})
    assert {**arguments.base, **arguments.extra} == arguments.merged()
    assert arguments.extra["kv_cache_config"]["tokens_per_block"] == 32


def test_inline_arguments_come_before_the_file_and_both_before_ours(tmp_path):
    path = tmp_path / "extra.yaml"
    path.write_text(yaml.safe_dump({"stream_interval": 2, "max_batch_size": 5, "kv_cache_config": {"dtype": "fp8"}}))
    inline = {"stream_interval": 4, "kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    together = made(extra_llm_api_options=str(path), llm_args=inline).merged()
    assert (together["stream_interval"], together["max_batch_size"]) == (4, 5)
    assert together["kv_cache_config"]["dtype"] == "fp8" and together["kv_cache_config"]["tokens_per_block"] == 32
    assert together["kv_cache_config"]["free_gpu_memory_fraction"] == 0.5


def test_what_is_not_the_users_to_say_is_left_out_with_a_note():
    arguments = made(llm_args={"model": "other", "num_postprocess_workers": 4, "backend": "pytorch"})
    assert arguments.extra == {}
    assert [note.split(":")[0] for note in arguments.notes[:2]] == ["model", "num_postprocess_workers"]


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("[1, 2]", "holds a list"), ("a: b: c", "not YAML"), ("\tx", "not YAML")],
)
def test_a_bad_file_is_named(tmp_path, text, words):
    path = tmp_path / "extra.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArgumentsError, match=f"{path}: .*{words}"):
        made(extra_llm_api_options=str(path))


@pytest.mark.parametrize(
    ("llm_args", "problem"),
    [
        ({"max_batchsize": 1}, "max_batchsize: TensorRT-LLM 1.2 has no such argument; is max_batch_size meant?"),
        ({"kv_cache_config": {"tokens_in_block": 1}}, "is kv_cache_config.tokens_per_block meant?"),
        ({"zzz": 1}, "zzz: TensorRT-LLM 1.2 has no such argument"),
        (
            {"speculative_config": {"decoding_type": "mtp", "relaxed_top": 1}},
            "is speculative_config.relaxed_topk meant",
        ),
        ({"speculative_config": {}}, "speculative_config.decoding_type: is required"),
        ({"moe_config": {"load_balancer": {"slots": 1}}}, "is moe_config.load_balancer.num_slots meant?"),
    ],
)
def test_unknown_names_come_with_the_nearest_known(llm_args, problem):
    with pytest.raises(ArgumentsError) as caught:
        made(llm_args=llm_args)
    assert problem in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ArgumentsError) as caught:
        made(llm_args={"aaaa": 1, "bbbb": 2, "max_beam_width": 4})
    assert len(str(caught.value).splitlines()) == 3


def test_names_of_other_versions_are_passed_on_with_a_note():
    arguments = made(llm_args={"kv_cache_config": {"use_kv_cache_manager_v2": True}, "model_kwargs": {}})
    assert arguments.extra["kv_cache_config"]["use_kv_cache_manager_v2"] is True
    assert sum("is not in every TensorRT-LLM 1.2" in note for note in arguments.notes) == 2


def test_mappings_may_come_as_text():
    options = TensorRTLLMOptions.model_validate({"llm_args": '{"stream_interval": 2}', "environment": "{A: b}"})
    assert options.llm_args == {"stream_interval": 2} and options.environment == {"A": "b"}
