"""From settings to a plan: which plugins, which worker processes, which commands start them."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtserve.plugins.api import EnginePlan, LaunchSpec, Mode, ModeConfig, Role, WorkerId
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.plugins.routing_api import PolicyConfig, RoutingPolicy
from trtserve.server.engine_plans import describe_engine, gpus_of_workers, plan_engines
from trtserve.server.workers.engine_config import VISIBLE_GPUS
from trtserve.server.workers.token import given_token
from trtserve.settings.dry_run import resolved_settings, yaml_lines
from trtserve.settings.errors import SettingsError
from trtserve.settings.schema import RoleSettings, Settings

logger = logging.getLogger(__name__)

_NOT_FOR_WORKERS = {
    *("api_key", "api_key_file", "worker_token", "worker_token_file"),
    *("dry_run", "gpus", "log_dir", "served_model_name"),
}
WORKER_TOKEN_VARIABLE = "TRTSERVE_WORKER_TOKEN"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker to start."""

    worker_id: WorkerId
    role: Role
    device: str | None = None  # None: as the settings say
    gpus: tuple[str, ...] = ()  # all that it sees; (): what the server sees


@dataclass(frozen=True, slots=True)
class Plan:
    """The deployment that the settings describe, with its plugins checked."""

    mode: Mode
    policy: RoutingPolicy
    engine_options: Mapping[str, Any]
    router_options: Mapping[str, Any]
    workers: tuple[WorkerPlan, ...]
    engines: Mapping[Role, EnginePlan] = field(default_factory=dict)  # of engines that have plans
    warnings: tuple[str, ...] = ()  # why it could not start here and now; only for --dry-run


def make_plan(settings: Settings, manager: PluginManager) -> Plan:
    """Raises PluginError naming everything that cannot be had, SettingsError where no worker could ever join. For
    --dry-run, what is only not there on this machine is a warning."""
    plugins = _plugins_of(settings)
    problems = [problem for plugin in plugins if (problem := manager.load_problem(*plugin)) is not None]
    if problems:
        raise PluginError("\n".join(problems))
    engine_options = manager.check_options("engine", settings.engine, settings.engine_options)
    router_options = manager.check_options("policy", settings.router, settings.router_options)
    mode = manager.make_mode(
        settings.mode,
        ModeConfig(settings.workers, settings.prefill_workers, settings.decode_workers, settings.disagg_policy),
    )
    policy = manager.make_policy(settings.router, PolicyConfig(settings.seed, router_options))
    engines = plan_engines(settings, mode.roles, manager)
    workers = _workers(settings, mode, engines)
    warnings = _missing(plugins, workers, engines, manager)
    if warnings and not settings.dry_run:
        raise PluginError("\n".join(warnings))
    if not workers and given_token(settings) is None:
        warnings.append(_NO_TOKEN)
        if not settings.dry_run:
            raise SettingsError(_NO_TOKEN)
    if not settings.dry_run:
        for role, engine in engines.items():
            for note in engine.notes:
                logger.info("%s: %s", role, note)
    return Plan(mode, policy, engine_options, router_options, workers, engines, tuple(warnings))


_NO_TOKEN = (
    "--workers 0: workers that are started by hand show a token; give --worker-token-file or "
    "TRTSERVE_WORKER_TOKEN to the server and to them"
)


def _missing(
    plugins: Iterable[tuple[str, str]],
    workers: tuple[WorkerPlan, ...],
    engines: Mapping[Role, EnginePlan],
    manager: PluginManager,
) -> list[str]:
    """What is not installed here. The engine is needed where workers start, and a transfer where the engine has none
    of its own."""
    not_needed = {"engine"} if not workers else set()
    if any(engine.moves_kv for engine in engines.values()):
        not_needed.add("transfer")
    return [
        problem
        for kind, name in plugins
        if kind not in not_needed and (problem := manager.missing(kind, name)) is not None
    ]


def with_usable_transfer(settings: Settings, manager: PluginManager) -> Settings:
    """The settings with ucx instead of nixl, and a warning, where TensorRT-LLM's variable (no setting of ours) asks for
    nixl on an arm64 machine that cannot use it: TensorRT-LLM's example does the same there."""
    is_asked_by_variable = settings.transfer == "nixl" and "transfer" not in settings.model_fields_set
    if not is_asked_by_variable or platform.machine() not in ("aarch64", "arm64"):
        return settings
    problem = manager.problem("transfer", "nixl")
    if problem is None:
        return settings
    logger.warning("TRTLLM_USE_NIXL_KVCACHE is 1, but on this arm64 machine %s; ucx is used instead", problem)
    return settings.model_copy(update={"transfer": "ucx"})


def _workers(settings: Settings, mode: Mode, engines: Mapping[Role, EnginePlan]) -> tuple[WorkerPlan, ...]:
    """Engines with a plan see their own GPUs only. Others see all of them, so that workers on two can read each
    other's memory."""
    places = [(role, number) for role, count in mode.roles.items() for number in range(count)]
    ids = [WorkerId(f"{role}-{number}") for role, number in places]
    roles = [role for role, _ in places]
    if engines:
        seen = gpus_of_workers(settings, roles, engines)
        return tuple(
            WorkerPlan(worker_id, role, gpus=visible) for worker_id, role, visible in zip(ids, roles, seen, strict=True)
        )
    gpus = [f"cuda:{int(gpu)}" for gpu in (settings.gpus or "").split(",") if gpu]
    if gpus and (len(gpus) < len(places) or len(set(gpus)) < len(gpus)):
        raise SettingsError(
            f"--gpus {settings.gpus}: each of the {len(places)} workers needs a GPU of its own; name as many, each once"
        )
    return tuple(
        WorkerPlan(worker_id, role, gpus[place] if gpus else None)
        for place, (worker_id, role) in enumerate(zip(ids, roles, strict=True))
    )


def _plugins_of(settings: Settings) -> list[tuple[str, str]]:
    plugins = [
        ("mode", settings.mode),
        ("engine", settings.engine),
        ("policy", settings.router),
        ("launcher", settings.launcher),
    ]
    if settings.transfer != "auto":
        plugins.append(("transfer", settings.transfer))
    return plugins


def describe_plan(settings: Settings, plan: Plan) -> str:
    """What --dry-run prints: the resolved settings, then processes and ports. YAML, so it can be used as --config."""
    resolved = resolved_settings(settings, plan.engine_options)
    for role in ("prefill", "decode"):
        if getattr(settings, role) == RoleSettings():
            del resolved[role]
    lines = yaml_lines(resolved)
    endpoint = settings.worker_endpoint or "ipc:// in a private folder"
    lines += [
        "",
        "# processes",
        f"#   server   http://{settings.host}:{settings.port}   workers connect to {endpoint}",
        *_transfer_lines(settings, plan),
        *(_worker_line(settings, worker) for worker in plan.workers),
    ]
    for role, engine in plan.engines.items():
        lines += describe_engine(settings.engine, role, engine)
    if plan.warnings:
        lines += ["", "# it would not start here:", *(f"#   {warning}" for warning in plan.warnings)]
    return "\n".join(lines)


def _worker_line(settings: Settings, worker: WorkerPlan) -> str:
    place = "" if worker.device is None else f", on {worker.device}"
    if worker.gpus:
        place = f", on GPU{'s' if len(worker.gpus) > 1 else ''} {','.join(worker.gpus)}"
    return f"#   {worker.worker_id}   role {worker.role}, engine {settings.engine}{place}"


def _transfer_lines(settings: Settings, plan: Plan) -> list[str]:
    """How KV moves, in a mode in which it does."""
    if len(plan.mode.roles) < 2:
        return []
    if any(engine.moves_kv for engine in plan.engines.values()):
        return [f"#   KV moves by {settings.engine} itself"]
    tokens = settings.kv_transfer_tokens
    room = "a quarter of its KV cache" if tokens is None else f"{tokens} tokens"
    return [f"#   KV moves by {settings.transfer}, each worker holds {room} for others"]


class WorkerCommands:
    """Builds the command of each worker; owns the file with the settings that workers read."""

    def __init__(
        self,
        settings: Settings,
        model_path: Path,
        runtime_dir: Path,
        endpoint: str,
        token: str,
        workers: Iterable[WorkerPlan] = (),
        engines: Mapping[Role, EnginePlan] | None = None,
    ) -> None:
        """workers and engines: those of the plan. Raises SettingsError where there can be no folder for the logs."""
        self._planned = {worker.worker_id: worker for worker in workers}
        self._engines = engines or {}
        self._endpoint = endpoint
        self._token = token
        self._log_dir = settings.log_dir or runtime_dir
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"--log-dir {self._log_dir}: cannot be made: {error.strerror}") from error
        self._settings_file = runtime_dir / "settings.json"
        content = settings.model_dump(mode="json", exclude=_NOT_FOR_WORKERS, exclude_none=True)
        self._settings_file.write_text(json.dumps(content | {"model": str(model_path)}))

    def spec(self, worker_id: WorkerId, role: Role) -> LaunchSpec:
        """role: the present one. The engine stays what it was planned to be when the role was changed meanwhile."""
        planned = self._planned.get(worker_id, WorkerPlan(worker_id, role))
        argv = (
            *(sys.executable, "-m", "trtserve.server.cli", "worker"),
            *("--config", str(self._settings_file)),
            *("--connect", self._endpoint),
            *("--worker-id", worker_id),
            *("--role", role),
            *("--parent-pid", str(os.getpid())),
            *(("--device", planned.device) if planned.device is not None else ()),
            *(("--engine-role", planned.role) if planned.role is not role else ()),
        )
        log_path = str(self._log_dir / f"{worker_id}.log")
        return LaunchSpec(worker_id, argv, self._environment(planned), log_path)

    def _environment(self, planned: WorkerPlan) -> dict[str, str]:
        engine = self._engines.get(planned.role)
        unset = frozenset(engine.unset if engine is not None else ())
        # The file has the settings as resolved; the server's own variables would override it.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("TRTSERVE_") and name not in unset
        }
        if engine is not None:
            environment |= engine.environment
        if planned.gpus:
            environment[VISIBLE_GPUS] = ",".join(planned.gpus)
        return environment | {WORKER_TOKEN_VARIABLE: self._token, "PYTHONUNBUFFERED": "1"}
