"""Imports TensorRT-LLM's argument classes from its source on a machine that has neither its libraries nor a GPU.

Four modules are real (`REAL_MODULES`); whatever else of tensorrt_llm, torch or transformers they import is a stub that
accepts everything. To be used in a process of its own: it changes what `import tensorrt_llm` means.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic_core import core_schema

REAL_MODULES = (
    "tensorrt_llm.llmapi.llm_args",
    "tensorrt_llm.sampling_params",
    "tensorrt_llm.disaggregated_params",
    "tensorrt_llm.scheduling_params",
)

_STUBBED_PACKAGES = ("tensorrt_llm", "tensorrt", "torch", "transformers", "strenum", "mpi4py", "nvtx", "numpy")


class _StubMeta(type):
    """A class whose every public attribute is another such class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stub = _stub(name)
        setattr(cls, name, stub)
        return stub

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        """An instance or, where it is a decorator, the decorated thing."""
        if len(arguments) == 1 and not keywords and isinstance(arguments[0], FunctionType | type):
            return arguments[0]
        return super().__call__(*arguments, **keywords)


class Stub(metaclass=_StubMeta):
    """Takes any arguments, has any attribute, may be called; a decorator of it gives the decorated thing back."""

    __members__: ClassVar[dict[str, Any]] = {}

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else Stub()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.any_schema()


class StrictBaseModel(BaseModel):
    """What `tensorrt_llm.llmapi.utils` gives the argument classes as their base."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class _StubModule(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        stub = _stub(name)
        setattr(self, name, stub)
        return stub


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Real sources for the real modules, stubs for the rest of the packages above."""

    def __init__(self, package: Path) -> None:
        self._package = package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] not in _STUBBED_PACKAGES:
            return None
        if fullname in REAL_MODULES:
            file = self._package.joinpath(*fullname.split(".")[1:]).with_suffix(".py")
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        for name, value in _GIVEN.get(module.__name__, {}).items():
            setattr(module, name, value)


def load(package: Path) -> dict[str, ModuleType]:
    """The real modules by the last part of their names. Raises what they raise while they are imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _STUBBED_PACKAGES]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(package))
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in REAL_MODULES}


def _stub(name: str) -> _StubMeta:
    return _StubMeta(name, (Stub,), {"__members__": {}})


def _no_docstring(*arguments: Any, **keywords: Any) -> str:
    return ""


_CUDA = SimpleNamespace(
    device_count=lambda: 8,
    is_available=lambda: True,
    get_device_properties=lambda *_: SimpleNamespace(major=9, minor=0),
    get_device_capability=lambda *_: (9, 0),
)

_GIVEN: dict[str, dict[str, Any]] = {
    "strenum": {"StrEnum": enum.StrEnum},
    "torch": {"cuda": _CUDA},
    "tensorrt_llm.llmapi.utils": {
        "StrictBaseModel": StrictBaseModel,
        "generate_api_docs_as_docstring": _no_docstring,
        "get_type_repr": repr,
    },
}
"""What a stub must be exactly."""
