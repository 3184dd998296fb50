"""The pluggy hooks: they make things by name, then plain methods do the work.

A plugin is a module or object registered under the entry-point group ``trtserve`` with the name ``KIND.NAME``
(``engine.torch``, ``policy.random``); kinds: engine, mode, policy, launcher, transfer. A process imports only the
plugins that it needs, by that name; `trtserve plugins` imports every one, to say whether it can be used. Each
implements the hook of its kind and returns None for names that are not its own. Heavy libraries are imported inside
`make_…`.

Hooks are called in the server process where nothing else is said. They raise nothing but what is said here; anything
else counts as a defect of the plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy
from pydantic import BaseModel

from trtserve.plugins.api import (
    Engine,
    EngineConfig,
    EnginePlan,
    Launcher,
    Mode,
    ModeConfig,
    Role,
)
from trtserve.plugins.routing_api import PolicyConfig, RoutingPolicy
from trtserve.plugins.transfer_api import KVTransfer

GROUP = "trtserve"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec(firstresult=True)
def make_engine(name: str, config: EngineConfig) -> Engine | None:
    """An engine, not yet started; called in the worker process only, once. config.options has passed
    `options_model`."""


@hookspec(firstresult=True)
def plan_engine(name: str, config: EngineConfig) -> EnginePlan | None:
    """What workers with this engine need, for engines that choose their own GPUs; called in the server process before
    anything starts, and in workers started by hand. config.model_path may be a hub id here. Pure but for files that the
    options name. Raises PlanRefused. Engines without it run on the device of their configuration."""


@hookspec(firstresult=True)
def setting_defaults(name: str) -> Mapping[str, Any] | None:
    """Settings whose default is another one with this engine, such as the block size, by the names of
    `trtserve.settings.schema`; for those that nobody gave. Called in the server and in every worker."""


@hookspec(firstresult=True)
def check_plans(name: str, plans: Mapping[Role, EnginePlan]) -> list[str] | None:
    """What does not go together in the plans of roles that hand KV to each other: a sentence for each."""


@hookspec(firstresult=True)
def make_mode(name: str, config: ModeConfig) -> Mode | None:
    """A serving mode, one for all requests."""


@hookspec(firstresult=True)
def make_policy(name: str, config: PolicyConfig) -> RoutingPolicy | None:
    """A routing policy, one for all roles. config.options has passed `options_model`."""


@hookspec(firstresult=True)
def make_launcher(name: str) -> Launcher | None:
    """Something that starts worker processes."""


@hookspec(firstresult=True)
def make_transfer(name: str) -> KVTransfer | None:
    """A way to move KV blocks between workers, not yet opened; called in prefill and decode workers. May raise
    `trtserve.plugins.transfer_api.TransferError`."""


@hookspec(firstresult=True)
def missing(kind: str, name: str) -> str | None:
    """Why `name` cannot be used here, in one line that says what to install; None if it can. Imports nothing heavy."""


@hookspec(firstresult=True)
def options_model(kind: str, name: str) -> type[BaseModel] | None:
    """The pydantic model of the plugin's own options, each field with bounds and a description. A plugin without one
    takes no options. Set by `--engine-options` and `--router-options`; of a transfer only the defaults can be had, and
    modes and launchers are not asked."""
