"""The arguments of one role's engine, as the rules look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtserve.plugins.api import EngineConfig, Role
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions

DEFAULT_MAX_NUM_TOKENS = 8192
"""TensorRT-LLM's own."""

_DEFAULT_GRAPH_BATCH = 128


@dataclass(frozen=True, slots=True)
class Facts:
    """The arguments of one role's engine; what is absent counts as TensorRT-LLM's default."""

    arguments: Mapping[str, Any]
    config: EngineConfig
    options: TensorRTLLMOptions

    def number(self, name: str, default: int) -> int:
        """An argument, or the default where it is no integer."""
        value = self.arguments.get(name)
        return value if isinstance(value, int) else default

    def inner(self, name: str) -> Mapping[str, Any]:
        """As `inner`, of the arguments."""
        return inner(self.arguments, name)

    @property
    def world_size(self) -> int:
        """GPUs of one worker."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
        product = 1
        for name in sizes:
            product *= self.number(name, 1)
        return product

    @property
    def draft_length(self) -> int:
        """Tokens drafted for each sequence in a pass; 0: no speculation."""
        return draft_length(self.arguments)

    @property
    def largest_graph(self) -> int:
        """Sequences of the largest CUDA graph that can be used; 0: there are none."""
        graphs = self.arguments.get("cuda_graph_config", {})
        if not isinstance(graphs, Mapping):
            return 0
        sizes = graphs.get("batch_sizes") or [graphs.get("max_batch_size") or _DEFAULT_GRAPH_BATCH]
        return int(min(max(sizes), self.number("max_batch_size", _DEFAULT_GRAPH_BATCH)))

    @property
    def longest_prompt(self) -> int | None:
        """As `longest_prompt`, of the arguments."""
        return longest_prompt(self.arguments)

    @property
    def moves_kv(self) -> bool:
        """Whether it takes part in a hand-over."""
        return self.config.role is not Role.AGG


def inner(arguments: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A block of arguments; empty where there is none."""
    value = arguments.get(name)
    return value if isinstance(value, Mapping) else {}


def draft_length(arguments: Mapping[str, Any]) -> int:
    """Tokens drafted for each sequence in a pass; 0: no speculation."""
    speculation = inner(arguments, "speculative_config")
    if not speculation:
        return 0
    length = speculation.get("num_nextn_predict_layers", speculation.get("max_draft_len"))
    return length if isinstance(length, int) else 1


def longest_prompt(arguments: Mapping[str, Any]) -> int | None:
    """Tokens; None where the model alone bounds it."""
    longest = arguments.get("max_seq_len")
    return longest - 1 if isinstance(longest, int) else None


Rule = Callable[[Facts], str | None]
"""A sentence about what is wrong, or None."""
