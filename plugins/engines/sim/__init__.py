"""The simulated engine, plugin "engine.sim": schedules, caches, times and fails like an engine, without a model.

See docs/simulated_engine.md. Imports neither torch nor numpy.
"""

from __future__ import annotations

from pydantic import BaseModel

from trtserve.plugins.api import Engine, EngineConfig
from trtserve.plugins.hooks import hookimpl

NAME = "sim"


@hookimpl
def make_engine(name: str, config: EngineConfig) -> Engine | None:
    """The simulated engine on a thread of its own; raises pydantic.ValidationError for wrong options."""
    if name != NAME:
        return None
    from trtserve.plugins.driver import Driver
    from trtserve.plugins.engines.sim.engine import SimEngine

    engine = SimEngine(config)
    return Driver(engine, interrupt=engine.interrupt)


@hookimpl
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    """The engine's options."""
    if (kind, name) != ("engine", NAME):
        return None
    from trtserve.plugins.engines.sim.options import SimOptions

    return SimOptions
