"""From settings to what an engine is made of, the same in the server that plans it and in the worker that runs it."""

from __future__ import annotations

import os
from typing import TypeVar

from trtserve.plugins.api import EngineConfig, EnginePlan, Role
from trtserve.plugins.manager import PluginManager
from trtserve.settings.roles import for_role
from trtserve.settings.schema import Settings

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"

AnySettings = TypeVar("AnySettings", bound=Settings)


def with_engine_defaults(settings: AnySettings, manager: PluginManager) -> AnySettings:
    """The settings with the engine's own defaults for what nobody gave."""
    defaults = manager.setting_defaults(settings.engine)
    return settings.model_copy(
        update={name: value for name, value in defaults.items() if name not in settings.model_fields_set}
    )


def engine_config(settings: Settings, role: str, model_path: str, manager: PluginManager) -> EngineConfig:
    """For an engine of this role. Raises PluginError naming every bad engine option."""
    own = for_role(settings, role)
    return EngineConfig(
        model_path=model_path,
        role=Role(role),
        dtype=own.dtype,
        device=own.device,
        block_size=own.block_size,
        num_blocks=own.num_blocks,
        kv_cache_gib=own.kv_cache_gib,
        max_num_seqs=own.max_num_seqs,
        max_num_tokens=own.max_num_tokens,
        max_seq_len=own.max_seq_len,
        enable_prefix_caching=own.enable_prefix_caching,
        seed=own.seed,
        transfer=own.transfer,
        options=manager.check_options("engine", own.engine, own.engine_options),
    )


def take_environment(plan: EnginePlan | None, gpus: str | None) -> None:
    """A server gives the workers that it starts their environment; one that was started by hand has to see to it
    itself, before the engine's libraries are loaded. gpus: as the settings name them."""
    if plan is None:
        return
    if gpus is not None:
        os.environ[VISIBLE_GPUS] = gpus
    for name in plan.unset:
        os.environ.pop(name, None)
    os.environ.update(plan.environment)
