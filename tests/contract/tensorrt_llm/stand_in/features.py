"""Other versions' fields and keywords: `WITHOUT=Owner.name` takes one away, `WITH=Owner.name` adds one.

So that feature detection can be tested: an adapter must look at fields and signatures, never at the version alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from .environment import listed

Class = TypeVar("Class", bound=type)
Model = TypeVar("Model", bound=type[BaseModel])


def _names(variable: str, owner: str) -> list[str]:
    return sorted(item.split(".", 1)[1] for item in listed(variable) if item.split(".", 1)[0] == owner)


def versioned_fields(cls: Class) -> Class:
    """Apply to a class before `dataclass` sees it. An added field is anything, None by default."""
    for name in _names("WITHOUT", cls.__name__):
        del cls.__annotations__[name]
        if hasattr(cls, name):
            delattr(cls, name)
    for name in _names("WITH", cls.__name__):
        cls.__annotations__[name] = "Any"
        setattr(cls, name, None)
    return cls


def versioned_model(cls: Model) -> Model:
    """Apply to a finished pydantic model. Only removal: what a later version adds no adapter needs to emit."""
    for name in _names("WITHOUT", cls.__name__):
        del cls.__pydantic_fields__[name]
    if _names("WITHOUT", cls.__name__):
        cls.model_rebuild(force=True)
    return cls


def versioned_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a signature of another version, which its calls are held to."""
    full = inspect.signature(function)
    without = set(_names("WITHOUT", function.__name__))
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _names("WITH", function.__name__)
    ]
    kept = [parameter for name, parameter in full.parameters.items() if name not in without]
    signature = full.replace(parameters=[*kept, *added])

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        bound = signature.bind(*arguments, **keywords)
        for parameter in added:
            bound.arguments.pop(parameter.name, None)
        return function(**bound.arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
