"""Gives argument values to TensorRT-LLM's own pydantic classes, one field at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from trtserve.plugins.engines.tensorrt_llm.arguments import LLMArguments
from trtserve.plugins.engines.tensorrt_llm.native_stubs import load
from trtserve.plugins.engines.tensorrt_llm.source_reading import find_package


class ArgumentValues:
    """The classes of one source. `problem` says why they could not be loaded; empty where they could."""

    def __init__(self, package: Path) -> None:
        self.problem = ""
        self._module = _installed(package)
        try:
            self._module = self._module or load(package)["llm_args"]
        except Exception as error:  # whatever a version's module does while it is imported
            self.problem = f"llm_args cannot be imported here: {type(error).__name__}: {error}"

    def refusals(self, arguments: LLMArguments) -> list[str]:
        """What is refused, `name: why` each; merged as the worker merges. Nothing where `problem` says something."""
        if self._module is None:
            return []
        try:
            merged = self._module.update_llm_args_with_extra_dict(
                copy.deepcopy(arguments.base), copy.deepcopy(arguments.extra)
            )
        except (ValidationError, ValueError, TypeError, AssertionError) as error:
            return [f"update_llm_args_with_extra_dict: {_first_line(error)}"]
        fields = self._module.TorchLlmArgs.model_fields
        found = list(_lost(merged, arguments.merged()))
        found += [(name, _refusal(fields[name].annotation, value)) for name, value in merged.items() if name in fields]
        return [f"{name}: {why}" for name, why in found if why]


def _lost(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `LLMArguments.merged` has, and the rules were checked on, but TensorRT-LLM's merging has not."""
    for name, value in ours.items():
        if name not in theirs:
            yield name, "is lost in merging"
        elif isinstance(value, Mapping) and isinstance(theirs[name], Mapping) and dict(value) != dict(theirs[name]):
            lost = sorted(key for key in value if key not in theirs[name] or theirs[name][key] != value[key])
            yield name, f"{', '.join(lost)} is lost in merging"


def _installed(package: Path) -> ModuleType | None:
    """The module as `import` finds it, if that is of this source and there is all that it needs."""
    if find_package(None) != package:
        return None
    try:
        return import_module("tensorrt_llm.llmapi.llm_args")
    except Exception:  # no libraries, no driver: the stubs are for that
        return None


def _refusal(annotation: Any, value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""  # made, and so checked, by the merging
    try:
        TypeAdapter(annotation, config=_config_for(annotation)).validate_python(value)
    except ValidationError as error:
        return _first_line(error)
    return ""


def _config_for(annotation: Any) -> Any:
    """Models bring their own; pydantic forbids giving them one."""
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return None if is_model else {"arbitrary_types_allowed": True}


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first: Mapping[str, Any] = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])} {first['msg']}".strip()
    return str(error).partition("\n")[0]
