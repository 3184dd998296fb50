"""Finds plugins by name, loads only those that are asked for, and explains the ones that cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel, ValidationError

from trtserve.plugins import hooks
from trtserve.plugins.api import (
    Engine,
    EngineConfig,
    EnginePlan,
    Launcher,
    Mode,
    ModeConfig,
    PlanRefused,
    Role,
)
from trtserve.plugins.routing_api import PolicyConfig, RoutingPolicy
from trtserve.plugins.transfer_api import KVTransfer

_Made = TypeVar("_Made")

KINDS = ("mode", "engine", "policy", "transfer", "launcher")


class PluginError(Exception):
    """A plugin is not there, cannot be used here, or was given bad options; the text says what to do."""


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """One line of `trtserve plugins`."""

    kind: str
    name: str
    package: str  # the distribution it comes from
    problem: str | None  # why it cannot be used, or None


class PluginManager:
    """One per process. `names` imports nothing, `make_*` the one plugin they need, `statuses` every plugin."""

    def __init__(self) -> None:
        self._found: dict[str, EntryPoint] = {point.name: point for point in entry_points(group=hooks.GROUP)}
        self._manager = pluggy.PluginManager(hooks.GROUP)
        self._manager.add_hookspecs(hooks)

    def names(self, kind: str) -> list[str]:
        return sorted(name.partition(".")[2] for name in self._found if name.startswith(f"{kind}."))

    def statuses(self) -> list[PluginStatus]:
        """Every plugin that is installed, with what is missing for it."""
        rows = []
        for kind in KINDS:
            for name in self.names(kind):
                point = self._found[f"{kind}.{name}"]
                package = point.dist.name if point.dist is not None else "?"
                rows.append(PluginStatus(kind, name, package, self.problem(kind, name)))
        return rows

    def problem(self, kind: str, name: str) -> str | None:
        """Why the plugin cannot be used here, in one line; None if it can."""
        return self.load_problem(kind, name) or self.missing(kind, name)

    def load_problem(self, kind: str, name: str) -> str | None:
        """Why there is no such plugin, or why it cannot be loaded; None if it can."""
        try:
            self._load(kind, name)
        except PluginError as error:
            return str(error)
        return None

    def missing(self, kind: str, name: str) -> str | None:
        """What a plugin that can be loaded lacks on this machine; None if nothing."""
        missing: str | None = self._manager.hook.missing(kind=kind, name=name)
        return missing

    def make_engine(self, name: str, config: EngineConfig) -> Engine:
        self.require("engine", name)
        engine: Engine | None = self._manager.hook.make_engine(name=name, config=config)
        return _made(engine, "engine", name)

    def setting_defaults(self, name: str) -> Mapping[str, Any]:
        """Of an engine; nothing for one that cannot be loaded."""
        if self.load_problem("engine", name) is not None:
            return {}
        return self._manager.hook.setting_defaults(name=name) or {}

    def plan_engine(self, name: str, config: EngineConfig) -> EnginePlan | None:
        """None for an engine that has no plans. Raises PluginError naming every problem. The engine's libraries need
        not be there."""
        self._load("engine", name)
        try:
            plan: EnginePlan | None = self._manager.hook.plan_engine(name=name, config=config)
        except PlanRefused as error:
            lines = "\n".join(f"  {line}" for line in str(error).splitlines())
            raise PluginError(f"engine {name} cannot run as {config.role}:\n{lines}") from None
        return plan

    def check_plans(self, name: str, plans: Mapping[Role, EnginePlan]) -> None:
        """Raises PluginError naming all that does not go together."""
        problems: list[str] = self._manager.hook.check_plans(name=name, plans=plans) or []
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise PluginError(f"the {' and '.join(plans)} workers of engine {name} do not go together:\n{lines}")

    def make_mode(self, name: str, config: ModeConfig) -> Mode:
        self.require("mode", name)
        mode: Mode | None = self._manager.hook.make_mode(name=name, config=config)
        return _made(mode, "mode", name)

    def make_policy(self, name: str, config: PolicyConfig) -> RoutingPolicy:
        self.require("policy", name)
        policy: RoutingPolicy | None = self._manager.hook.make_policy(name=name, config=config)
        return _made(policy, "policy", name)

    def make_transfer(self, name: str) -> KVTransfer:
        self.require("transfer", name)
        transfer: KVTransfer | None = self._manager.hook.make_transfer(name=name)
        return _made(transfer, "transfer", name)

    def make_launcher(self, name: str) -> Launcher:
        self.require("launcher", name)
        launcher: Launcher | None = self._manager.hook.make_launcher(name=name)
        return _made(launcher, "launcher", name)

    def check_options(self, kind: str, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in and values converted. Raises PluginError naming every bad one. What the
        plugin needs to run need not be there."""
        self._load(kind, name)
        model: type[BaseModel] | None = self._manager.hook.options_model(kind=kind, name=name)
        if model is None:
            if options:
                raise PluginError(f"{kind} {name} takes no options, got {', '.join(sorted(options))}")
            return {}
        try:
            return model.model_validate(dict(options)).model_dump()
        except ValidationError as error:
            setting = "router" if kind == "policy" else kind
            problems = [
                f"  {setting}-options.{'.'.join(map(str, item['loc']))}: {item['msg']} (got {item['input']!r:.100})"
                for item in error.errors(include_url=False)
            ]
            raise PluginError(f"bad options for {kind} {name}:\n" + "\n".join(problems)) from None

    def require(self, kind: str, name: str) -> None:
        """Load the plugin; raises PluginError unless it is installed and usable here."""
        problem = self.problem(kind, name)
        if problem is not None:
            raise PluginError(problem)

    def _load(self, kind: str, name: str) -> None:
        full_name = f"{kind}.{name}"
        if self._manager.has_plugin(full_name):
            return
        point = self._found.get(full_name)
        if point is None:
            raise PluginError(self._unknown(kind, name))
        try:
            plugin = point.load()
            # One module may stand behind several names.
            if not self._manager.is_registered(plugin):
                self._manager.register(plugin, full_name)
        except Exception as error:  # a foreign plugin may raise anything while it is imported
            raise PluginError(f"{kind} {name} cannot be loaded: {type(error).__name__}: {error}") from error

    def _unknown(self, kind: str, name: str) -> str:
        there = ", ".join(self.names(kind)) or "none"
        return f"there is no {kind} {name!r}; there are: {there}"


def _made(made: _Made | None, kind: str, name: str) -> _Made:
    if made is None:
        raise PluginError(f"the plugin {kind}.{name} did not make anything for its own name")
    return made
