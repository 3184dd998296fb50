"""The embedded engine: any Hugging Face decoder in torch, on the CPU or one CUDA device (hook module "engine.torch").

Importing this module imports neither torch nor transformers; making an engine does.
"""

from __future__ import annotations

from importlib.util import find_spec

from pydantic import BaseModel

from trtserve.plugins.api import Engine, EngineConfig
from trtserve.plugins.engines.torch.options import TorchOptions
from trtserve.plugins.hooks import hookimpl

_NAME = "torch"
_NEEDED = ("torch", "transformers", "safetensors")


@hookimpl
def make_engine(name: str, config: EngineConfig) -> Engine | None:
    """The embedded engine behind the shared driver thread, not yet started."""
    if name != _NAME:
        return None
    from trtserve.plugins.driver import Driver
    from trtserve.plugins.engines.torch.engine import TorchEngine

    return Driver(TorchEngine(config))


@hookimpl
def missing(kind: str, name: str) -> str | None:
    """Which library is not installed and how to get it; None where all are there."""
    if (kind, name) != ("engine", _NAME):
        return None
    absent = [library for library in _NEEDED if find_spec(library) is None]
    if not absent:
        return None
    return f"the torch engine needs {', '.join(absent)}: pip install 'trtserve[embedded]'"


@hookimpl
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    """The options of the embedded engine."""
    return TorchOptions if (kind, name) == ("engine", _NAME) else None
