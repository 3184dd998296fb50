"""The names of TensorRT-LLM that this engine uses, and what the installed version has of them.

Nothing is assumed of a version: 1.0 to 1.3 differ in keywords and fields, so they are looked up once, at start.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trtserve.plugins.engines.tensorrt_llm.unknown_names import meant


class UnknownArguments(ValueError):
    """Arguments of LLM that the installed version does not have."""


@dataclass(frozen=True, slots=True)
class Library:
    """Classes are TensorRT-LLM's own; sets hold the names of keywords or fields."""

    version: str
    llm: Callable[..., Any]
    sampling_params: Callable[..., Any]
    disaggregated_params: Callable[..., Any] | None  # None: this version has none
    scheduling_params: Callable[..., Any] | None
    guided_decoding_params: Callable[..., Any] | None
    request_error: type[BaseException]  # ends one request; any other exception ends the executor
    update_arguments: Callable[..., dict[str, Any]]  # (base, extra) -> merged; changes `extra`
    generate_keywords: frozenset[str]
    sampling_fields: frozenset[str]
    disaggregated_fields: frozenset[str]
    scheduling_fields: frozenset[str]
    argument_fields: frozenset[str]  # what LLM itself takes

    def about(self) -> tuple[tuple[str, str], ...]:
        """What a person who looks at a worker may want to know."""
        optional = {
            "cache_salt": "cache_salt" in self.generate_keywords,
            "scheduling_params": "scheduling_params" in self.generate_keywords,
            "priority": "priority" in self.generate_keywords,
            "disagg_request_id": "disagg_request_id" in self.disaggregated_fields,
            "schedule_style": "schedule_style" in self.disaggregated_fields,
        }
        there = " ".join(name for name, is_there in optional.items() if is_there)
        return ("tensorrt_llm", self.version), ("tensorrt_llm_features", there)

    def check_arguments(self, arguments: Iterable[str]) -> None:
        """Raises UnknownArguments naming all that this version does not have; LLM would name the first."""
        unknown = sorted(set(arguments) - self.argument_fields)
        if unknown:
            told = [f"{name}{meant(name, self.argument_fields)}" for name in unknown]
            raise UnknownArguments(f"TensorRT-LLM {self.version} has no argument {', '.join(told)}")


def load_library() -> Library:
    """Import TensorRT-LLM, in the worker process only. Raises ImportError, or AttributeError where a class that every
    version has is missing."""
    if find_spec("torch") is not None:
        import_module("torch")  # before tensorrt_llm, whose own libraries need torch's
    package = import_module("tensorrt_llm")
    sampling = import_module("tensorrt_llm.sampling_params")
    arguments = import_module("tensorrt_llm.llmapi.llm_args")
    disaggregated = _optional("tensorrt_llm.disaggregated_params", "DisaggregatedParams")
    scheduling = _optional("tensorrt_llm.scheduling_params", "SchedulingParams")
    return Library(
        version=str(package.__version__),
        llm=package.LLM,
        sampling_params=sampling.SamplingParams,
        disaggregated_params=disaggregated,
        scheduling_params=scheduling,
        guided_decoding_params=getattr(sampling, "GuidedDecodingParams", None),
        request_error=import_module("tensorrt_llm.executor.utils").RequestError,
        update_arguments=arguments.update_llm_args_with_extra_dict,
        generate_keywords=frozenset(inspect.signature(package.LLM.generate_async).parameters),
        sampling_fields=_fields(sampling.SamplingParams),
        disaggregated_fields=_fields(disaggregated),
        scheduling_fields=_fields(scheduling),
        argument_fields=frozenset(arguments.TorchLlmArgs.model_fields)
        | frozenset(inspect.signature(package.LLM).parameters),
    )


def _optional(module: str, name: str) -> Any | None:
    try:
        return getattr(import_module(module), name, None)
    except ModuleNotFoundError:
        return None


def _fields(kind: Any | None) -> frozenset[str]:
    names: Iterable[str] = () if kind is None else (field.name for field in dataclasses.fields(kind))
    return frozenset(names)
