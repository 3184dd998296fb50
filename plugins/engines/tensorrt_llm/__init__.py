"""TensorRT-LLM's PyTorch-backend `LLM` in worker processes (hook module "engine.tensorrt_llm").

Nothing here imports tensorrt_llm; making an engine does, in the worker. The server plans, checks and describes without
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import BaseModel

from trtserve.plugins.api import Engine, EngineConfig, EnginePlan, Role
from trtserve.plugins.engines.tensorrt_llm.options import TensorRTLLMOptions
from trtserve.plugins.hooks import hookimpl

_NAME = "tensorrt_llm"


@hookimpl
def make_engine(name: str, config: EngineConfig) -> Engine | None:
    """The engine, not yet started; imports tensorrt_llm no sooner than its start."""
    if name != _NAME:
        return None
    from trtserve.plugins.engines.tensorrt_llm.engine import TensorRTLLMEngine

    return TensorRTLLMEngine(config)


@hookimpl
def plan_engine(name: str, config: EngineConfig) -> EnginePlan | None:
    """What a worker with this configuration needs; raises PlanRefused naming every contradiction."""
    if name != _NAME:
        return None
    from trtserve.plugins.engines.tensorrt_llm.plan import plan_worker

    return plan_worker(config)


@hookimpl
def setting_defaults(name: str) -> Mapping[str, Any] | None:
    """TensorRT-LLM's own block size, which its kernels and all published configurations have."""
    return {"block_size": 32} if name == _NAME else None


@hookimpl
def check_plans(name: str, plans: Mapping[Role, EnginePlan]) -> list[str] | None:
    """What prefill and decode engines have to have alike."""
    if name != _NAME:
        return None
    from trtserve.plugins.engines.tensorrt_llm.rules import check_roles

    return check_roles({role: plan.arguments for role, plan in plans.items()})


@hookimpl
def missing(kind: str, name: str) -> str | None:
    """That TensorRT-LLM is not installed; None where it is."""
    if (kind, name) != ("engine", _NAME) or find_spec("tensorrt_llm") is not None:
        return None
    return (
        "the tensorrt_llm engine needs tensorrt_llm where its workers run: use the container (docs/operations.md), or "
        "pip install tensorrt_llm==1.2.1 --extra-index-url https://pypi.nvidia.com with Python 3.12 and CUDA 13"
    )


@hookimpl
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    """The options of the TensorRT-LLM engine."""
    return TensorRTLLMOptions if (kind, name) == ("engine", _NAME) else None
