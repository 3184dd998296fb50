"""The arguments of `tensorrt_llm.LLM` (`TorchLlmArgs`) and of the objects in them, by name.

Of TensorRT-LLM 1.2.1 as far as its public sources tell; see docs/tensorrt_llm.md for how sure that is. A name
that is only in later versions is known, and noted, since the worker's TensorRT-LLM decides.
"""

from __future__ import annotations

from collections.abc import Mapping

LLM = frozenset(
    {
        *("model", "tokenizer", "tokenizer_mode", "custom_tokenizer", "skip_tokenizer_init", "trust_remote_code"),
        *("tensor_parallel_size", "dtype", "revision", "tokenizer_revision", "pipeline_parallel_size"),
        *("context_parallel_size", "gpus_per_node", "moe_cluster_parallel_size", "moe_tensor_parallel_size"),
        *("moe_expert_parallel_size", "enable_attention_dp", "enable_lm_head_tp_in_adp", "pp_partition", "cp_config"),
        *("load_format", "enable_lora", "lora_config", "kv_cache_config", "enable_chunked_prefill"),
        *("guided_decoding_backend", "iter_stats_max_iterations"),
        *("request_stats_max_iterations", "peft_cache_config", "scheduler_config", "cache_transceiver_config"),
        *("sparse_attention_config", "speculative_config", "max_batch_size", "max_input_len", "max_seq_len"),
        *("max_beam_width", "max_num_tokens", "gather_generation_logits", "num_postprocess_workers"),
        *("postprocess_tokenizer_dir", "reasoning_parser", "mpi_session", "_mpi_session", "otlp_traces_endpoint"),
        *("backend", "return_perf_metrics", "orchestrator_type", "env_overrides", "cuda_graph_config"),
        *("attention_dp_config", "disable_overlap_scheduler", "moe_config", "nvfp4_gemm_config", "attn_backend"),
        *("sampler_type", "disable_flashinfer_sampling", "enable_iter_perf_stats", "enable_iter_req_stats"),
        *("print_iter_log", "batch_wait_timeout_ms", "batch_wait_timeout_iters", "batch_wait_max_tokens_ratio"),
        *("torch_compile_config", "enable_autotuner", "stream_interval"),
        *("allreduce_strategy", "checkpoint_format", "checkpoint_loader"),
        *("kv_connector_config", "garbage_collection_gen0_threshold", "max_stats_len"),
    }
)

LATER = frozenset(
    {
        *("model_kwargs", "perf_metrics_max_requests", "batched_logits_processor", "enable_layerwise_nvtx_marker"),
        *("force_dynamic_quantization", "mm_encoder_only"),
    }
)
"""Of newer versions, or of 1.2 without proof."""

_SPECULATIVE = frozenset(
    {
        *("decoding_type", "max_draft_len", "max_total_draft_tokens", "speculative_model", "speculative_model_dir"),
        *("max_concurrency", "draft_len_schedule", "load_format", "acceptance_window", "acceptance_length_threshold"),
        "allow_advanced_sampling",
    }
)

_MTP = frozenset(
    {
        *("num_nextn_predict_layers", "use_relaxed_acceptance_for_thinking", "relaxed_topk", "relaxed_delta"),
        *("use_mtp_vanilla", "mtp_eagle_one_model", "begin_thinking_phase_token", "end_thinking_phase_token"),
        *("BEGIN_THINKING_PHASE_TOKEN", "END_THINKING_PHASE_TOKEN"),
    }
)

_EAGLE = frozenset(
    {
        *("eagle_choices", "greedy_sampling", "posterior_threshold", "use_dynamic_tree", "dynamic_tree_max_topK"),
        *("num_eagle_layers", "max_non_leaves_per_layer", "eagle3_one_model", "eagle3_layers_to_capture"),
        "eagle3_model_arch",
    }
)

SPECULATIVE: Mapping[str, frozenset[str]] = {
    "MTP": _SPECULATIVE | _MTP,
    "Eagle": _SPECULATIVE | _EAGLE,
    "Eagle3": _SPECULATIVE | _EAGLE,
    "NGram": _SPECULATIVE | {"max_matching_ngram_size", "is_keep_all", "is_use_oldest", "is_public_pool"},
    "Draft_Target": _SPECULATIVE,
}
"""By `decoding_type`; other types are not looked into."""

NESTED: Mapping[str, frozenset[str]] = {
    "kv_cache_config": frozenset(
        {
            *("enable_block_reuse", "max_tokens", "max_attention_window", "sink_token_length"),
            *("free_gpu_memory_fraction", "host_cache_size", "onboard_blocks", "cross_kv_cache_fraction"),
            *("secondary_offload_min_priority", "event_buffer_max_size", "attention_dp_events_gather_period_ms"),
            *("enable_partial_reuse", "copy_on_partial_reuse", "use_uvm", "max_gpu_total_bytes", "dtype"),
            *("mamba_ssm_cache_dtype", "tokens_per_block"),
        }
    ),
    "scheduler_config": frozenset(
        {"capacity_scheduler_policy", "context_chunking_policy", "dynamic_batch_config"},
    ),
    "cache_transceiver_config": frozenset(
        {
            *("backend", "max_tokens_in_buffer", "kv_transfer_timeout_ms"),
            "kv_transfer_sender_future_timeout_ms",
        }
    ),
    "cuda_graph_config": frozenset({"batch_sizes", "max_batch_size", "enable_padding"}),
    "moe_config": frozenset(
        {
            *("backend", "max_num_tokens", "load_balancer", "disable_finalize_fusion"),
            "use_low_precision_moe_combine",
        }
    ),
    "attention_dp_config": frozenset({"enable_balance", "timeout_iters", "batching_wait_iters"}),
    "nvfp4_gemm_config": frozenset({"allowed_backends"}),
    "kv_connector_config": frozenset(
        {"connector_module", "connector_scheduler_class", "connector_worker_class"},
    ),
}

NESTED_LATER: Mapping[str, frozenset[str]] = {
    "kv_cache_config": frozenset({"use_kv_cache_manager_v2", "max_util_for_resume"}),
    "scheduler_config": frozenset({"waiting_queue_policy"}),
    "cache_transceiver_config": frozenset(
        {"transceiver_runtime", "kv_transfer_poll_interval_ms", "kv_cache_bounce_size_mb"},
    ),
}

LOAD_BALANCER = frozenset({"num_slots", "initial_global_assignments", "layer_updates_per_iter"})
"""Of `moe_config.load_balancer`, where it is not a file."""
