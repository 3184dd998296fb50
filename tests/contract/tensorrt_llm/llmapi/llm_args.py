"""`tensorrt_llm.llmapi.llm_args`: the LLM's arguments and how a YAML file is merged into them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, field_validator

from tensorrt_llm.stand_in.environment import variable
from tensorrt_llm.stand_in.features import versioned_model

from .configs import (
    AttentionDpConfig,
    CacheTransceiverConfig,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    CudaGraphConfig,
    KvCacheConfig,
    KvCacheConnectorConfig,
    LoadFormat,
    MoeConfig,
    MoeLoadBalancerConfig,
    Nvfp4GemmConfig,
    SchedulerConfig,
    StrictBaseModel,
)
from .speculation import (
    AutoDecodingConfig,
    DecodingBaseConfig,
    DraftTargetDecodingConfig,
    Eagle3DecodingConfig,
    EagleDecodingConfig,
    MTPDecodingConfig,
    NGramDecodingConfig,
)

__all__ = [
    "AttentionDpConfig", "AutoDecodingConfig", "CacheTransceiverConfig", "CapacitySchedulerPolicy",
    "ContextChunkingPolicy", "CudaGraphConfig", "DecodingBaseConfig", "DraftTargetDecodingConfig",
    "Eagle3DecodingConfig", "EagleDecodingConfig", "KvCacheConfig", "KvCacheConnectorConfig", "LlmArgs", "LoadFormat",
    "MTPDecodingConfig", "MoeConfig", "MoeLoadBalancerConfig", "NGramDecodingConfig", "Nvfp4GemmConfig",
    "SchedulerConfig", "TorchLlmArgs", "update_llm_args_with_extra_dict", "update_llm_args_with_extra_options",
]  # fmt: skip


_IS_LATER = variable("ARGUMENTS") == "1.3"


@versioned_model
class TorchLlmArgs(StrictBaseModel):
    """1.2.1's fields. Sizes that are None here are filled from the model when the LLM is made."""

    model: str
    tokenizer: Any = None
    tokenizer_mode: Literal["auto", "slow"] = "auto"
    custom_tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    revision: str | None = None
    tokenizer_revision: str | None = None
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    gpus_per_node: int | None = None
    moe_cluster_parallel_size: int | None = None
    moe_tensor_parallel_size: int | None = None
    moe_expert_parallel_size: int | None = None
    enable_attention_dp: bool = False
    enable_lm_head_tp_in_adp: bool = False
    pp_partition: list[int] | None = None
    cp_config: dict[str, Any] = Field(default_factory=dict)
    load_format: LoadFormat = LoadFormat.AUTO
    enable_lora: bool = False
    lora_config: Any = None
    peft_cache_config: Any = None
    kv_cache_config: KvCacheConfig = Field(default_factory=KvCacheConfig)
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    batched_logits_processor: Any = None
    iter_stats_max_iterations: int | None = None
    request_stats_max_iterations: int | None = None
    scheduler_config: SchedulerConfig = Field(default_factory=SchedulerConfig)
    cache_transceiver_config: CacheTransceiverConfig | None = None
    sparse_attention_config: Any = None
    speculative_config: DecodingBaseConfig | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_beam_width: int | None = None
    max_num_tokens: int | None = 8192
    gather_generation_logits: bool = False
    num_postprocess_workers: int = 0
    postprocess_tokenizer_dir: str | None = None
    reasoning_parser: str | None = None
    mpi_session: Any = Field(default=None, alias="_mpi_session")
    otlp_traces_endpoint: str | None = None
    backend: str | None = None
    return_perf_metrics: bool = False
    orchestrator_type: Literal["rpc", "ray"] | None = None
    env_overrides: dict[str, str] | None = None
    cuda_graph_config: CudaGraphConfig | None = Field(default_factory=CudaGraphConfig)
    attention_dp_config: AttentionDpConfig | None = None
    disable_overlap_scheduler: bool = False
    moe_config: MoeConfig = Field(default_factory=MoeConfig)
    nvfp4_gemm_config: Nvfp4GemmConfig = Field(default_factory=Nvfp4GemmConfig)
    attn_backend: str = "TRTLLM"
    sampler_type: Literal["auto", "TorchSampler", "TRTLLMSampler"] = "auto"
    disable_flashinfer_sampling: bool = False
    enable_iter_perf_stats: bool = False
    enable_iter_req_stats: bool = False
    print_iter_log: bool = False
    batch_wait_timeout_ms: float = 0
    batch_wait_timeout_iters: int = 0
    batch_wait_max_tokens_ratio: float = 0
    torch_compile_config: Any = None
    enable_autotuner: bool = True
    enable_layerwise_nvtx_marker: bool = False
    enable_min_latency: bool = False
    stream_interval: PositiveInt = 1
    force_dynamic_quantization: bool = False
    allreduce_strategy: Literal[
        "AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL", "NCCL_SYMMETRIC"
    ] = "AUTO"
    checkpoint_format: str | None = None
    checkpoint_loader: Any = None
    kv_connector_config: KvCacheConnectorConfig | None = None
    mm_encoder_only: bool = False
    garbage_collection_gen0_threshold: int = 20000
    max_stats_len: int = 1000

    @field_validator("load_format", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value.upper() not in LoadFormat.__members__:
                raise ValueError(f"Invalid LoadFormat: {value}")
            return LoadFormat[value.upper()]
        return value

    @field_validator("speculative_config", mode="before")
    @classmethod
    def _discriminated(cls, value: Any) -> Any:
        return DecodingBaseConfig.from_dict(dict(value)) if _IS_LATER and isinstance(value, dict) else value

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.context_parallel_size

    @property
    def parallel_config(self) -> Any:
        return SimpleNamespace(world_size=self.world_size, tp_size=self.tensor_parallel_size)


LlmArgs = TorchLlmArgs

_CONVERTED: dict[str, type[StrictBaseModel]] = {"attention_dp_config": AttentionDpConfig, "moe_config": MoeConfig}


def update_llm_args_with_extra_dict(
    llm_args: dict[str, Any], llm_args_dict: dict[str, Any], extra_llm_api_options: str | None = None
) -> dict[str, Any]:
    """The arguments with the YAML's keys on top: whole keys, nothing inside is merged. Changes its second argument."""
    for name, model in _CONVERTED.items():
        if name in llm_args_dict:
            llm_args_dict[name] = model(**llm_args_dict[name])
    if _IS_LATER:
        if "kv_cache_config" in llm_args_dict:
            both = llm_args.get("kv_cache_config", {}) | llm_args_dict["kv_cache_config"]
            llm_args_dict["kv_cache_config"] = KvCacheConfig(**both)
    elif "speculative_config" in llm_args_dict:
        llm_args_dict["speculative_config"] = DecodingBaseConfig.from_dict(llm_args_dict["speculative_config"])
    return llm_args | llm_args_dict


def update_llm_args_with_extra_options(llm_args: dict[str, Any], extra_llm_api_options: str | None) -> dict[str, Any]:
    """The same, from a file."""
    if not extra_llm_api_options:
        return llm_args
    with open(extra_llm_api_options, encoding="utf-8") as file:
        return update_llm_args_with_extra_dict(llm_args, yaml.safe_load(file) or {}, extra_llm_api_options)
