"""How the KV hand-over reaches into an engine, where the engine has something to offer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from trtserve.plugins.api import Engine, KVStoreEngine

_Result = TypeVar("_Result")


class Call(Protocol):
    """Runs a function on the thread that makes every other call to a `StepEngine`, between two steps, in the order of
    submits and calls."""

    def __call__(self, function: Callable[[], _Result], /) -> Future[_Result]: ...


@runtime_checkable
class _Driven(Protocol):
    """`trtserve.plugins.driver.Driver`, or an engine of a plugin's own that does the same."""

    @property
    def engine(self) -> object: ...

    def call(self, function: Callable[[], _Result], /) -> Future[_Result]: ...


@runtime_checkable
class _KVStore(KVStoreEngine, Protocol):
    """A `KVStoreEngine`, to ask whether something is one."""


@dataclass(frozen=True, slots=True)
class KVEngine:
    """The prefix cache of a running engine: call the methods of `store` by `call` only, or in the sink's `push`."""

    store: KVStoreEngine
    call: Call


def kv_engine_of(engine: Engine) -> KVEngine | None:
    """None of an engine that does not take part in the hand-over."""
    if isinstance(engine, _Driven) and isinstance(engine.engine, _KVStore):
        return KVEngine(engine.engine, engine.call)
    return None
