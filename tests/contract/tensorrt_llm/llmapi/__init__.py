"""`tensorrt_llm.llmapi`: the names that are imported from here."""

from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor import CompletionOutput, RequestError
from tensorrt_llm.sampling_params import GuidedDecodingParams, SamplingParams
from tensorrt_llm.scheduling_params import SchedulingParams

from .llm import LLM, RequestOutput
from .llm_args import (
    AttentionDpConfig,
    AutoDecodingConfig,
    CacheTransceiverConfig,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    CudaGraphConfig,
    DraftTargetDecodingConfig,
    EagleDecodingConfig,
    KvCacheConfig,
    LlmArgs,
    MoeConfig,
    MTPDecodingConfig,
    NGramDecodingConfig,
    SchedulerConfig,
    TorchLlmArgs,
)

__all__ = [
    "LLM", "AttentionDpConfig", "AutoDecodingConfig", "CacheTransceiverConfig", "CapacitySchedulerPolicy",
    "CompletionOutput", "ContextChunkingPolicy", "CudaGraphConfig", "DisaggregatedParams", "DraftTargetDecodingConfig",
    "EagleDecodingConfig", "GuidedDecodingParams", "KvCacheConfig", "LlmArgs", "MTPDecodingConfig", "MoeConfig",
    "NGramDecodingConfig", "RequestError", "RequestOutput", "SamplingParams", "SchedulerConfig", "SchedulingParams",
    "TorchLlmArgs",
]  # fmt: skip
