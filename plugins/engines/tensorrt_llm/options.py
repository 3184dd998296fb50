"""The TensorRT-LLM engine's own options (`--engine-options`).

Few have names of their own here: those that decide about processes and roles, and those with flags in trtllm-serve.
Every other argument of `tensorrt_llm.LLM` goes through `llm_args` or a file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

TransceiverBackend = Literal["UCX", "NIXL", "MOONCAKE", "MPI", "DEFAULT"]


def _parsed(value: Any) -> Any:
    """A mapping may come as YAML or JSON text, as flags give it."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


class TensorRTLLMOptions(BaseModel):
    """What can be chosen beyond `EngineConfig`. None: TensorRT-LLM's own default, where nothing else is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extra_llm_api_options: str | None = Field(
        default=None,
        min_length=1,
        description="YAML file with arguments of LLM, as trtllm-serve's --config and --extra_llm_api_options take it.",
    )
    llm_args: Annotated[dict[str, Any], BeforeValidator(_parsed)] = Field(
        default_factory=dict, description="The same inline; comes before the file."
    )

    tensor_parallel_size: int = Field(default=1, ge=1, le=4096, description="GPUs that share each layer.")
    pipeline_parallel_size: int = Field(default=1, ge=1, le=4096, description="Groups of layers on GPUs of their own.")
    moe_expert_parallel_size: int | None = Field(
        default=None, ge=1, le=4096, description="GPUs that experts are divided among; divides tensor_parallel_size."
    )
    gpus_per_node: int | None = Field(
        default=None, ge=1, le=1024, description="GPUs of one node, for a worker that spans several; none: one node."
    )
    enable_attention_dp: bool = Field(
        default=False, description="Attention is data parallel: each GPU attends to requests of its own."
    )

    trust_remote_code: bool = Field(default=False, description="Run code from the model's folder.")
    enable_chunked_prefill: bool = Field(
        default=True, description="Prompts longer than max_num_tokens take several passes; else they are refused."
    )
    kv_cache_free_gpu_memory_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Of the GPU memory left beside the weights, for the KV cache."
    )
    event_buffer_max_size: int = Field(
        default=16_384, ge=0, le=2**31 - 1, description="KV events that are kept until they are read; 0: none are made."
    )
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = Field(
        default=None, description="Without one, requests for JSON or grammars are refused."
    )

    transceiver_backend: Annotated[TransceiverBackend | None, BeforeValidator(_upper)] = Field(
        default=None,
        description="How KV moves between prefill and decode workers; none: as --transfer says, UCX for auto.",
    )
    kv_transfer_timeout_ms: int = Field(
        default=60_000, ge=1, le=86_400_000, description="After which a prompt's KV is given up, or not waited for."
    )

    warm_up_requests: int = Field(
        default=2, ge=0, le=100, description="Run before a worker is ready, since the first ones are slow."
    )
    single_process: bool | None = Field(
        default=None, description="Without MPI, in the worker's process, for one GPU; none: where there is one GPU."
    )
    environment: Annotated[dict[str, str], BeforeValidator(_parsed)] = Field(
        default_factory=dict, description="Variables of the worker's process, such as TRTLLM_… and UCX_…."
    )
