"""From settings to a plan: which plugins, which worker processes, which commands start them."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtserve.plugins.api import LaunchSpec, Mode, ModeConfig, Role, WorkerId
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.plugins.routing_api import PolicyConfig, RoutingPolicy
from trtserve.server.workers.token import given_token
from trtserve.settings.load import SettingsError
from trtserve.settings.schema import Settings

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


@dataclass(frozen=True, slots=True)
class Plan:
    """The deployment that the settings describe, with its plugins checked."""

    mode: Mode
    policy: RoutingPolicy
    engine_options: Mapping[str, Any]
    router_options: Mapping[str, Any]
    workers: tuple[WorkerPlan, ...]


def make_plan(settings: Settings, manager: PluginManager) -> Plan:
    """Raises PluginError naming everything that cannot be had, SettingsError where no worker could ever join."""
    problems = [problem for kind, name in _plugins_of(settings) if (problem := manager.problem(kind, name)) is not None]
    if problems:
        raise PluginError("\n".join(problems))
    engine_options = manager.check_options("engine", settings.engine, settings.engine_options)
    router_options = manager.check_options("policy", settings.router, settings.router_options)
    mode = manager.make_mode(
        settings.mode,
        ModeConfig(settings.workers, settings.prefill_workers, settings.decode_workers, settings.disagg_policy),
    )
    policy = manager.make_policy(settings.router, PolicyConfig(settings.seed, router_options))
    workers = _workers(settings, mode)
    if not workers and given_token(settings) is None:
        raise SettingsError(
            "--workers 0: workers that are started by hand show a token; give --worker-token-file or "
            "TRTSERVE_WORKER_TOKEN to the server and to them"
        )
    return Plan(mode, policy, engine_options, router_options, workers)


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


def _workers(settings: Settings, mode: Mode) -> tuple[WorkerPlan, ...]:
    """Every process sees all GPUs, so that workers on two of them can read each other's memory."""
    places = [(role, number) for role, count in mode.roles.items() for number in range(count)]
    gpus = [f"cuda:{int(gpu)}" for gpu in (settings.gpus or "").split(",") if gpu]
    if gpus and (len(gpus) < len(places) or len(set(gpus)) < len(gpus)):
        raise SettingsError(
            f"--gpus {settings.gpus}: each of the {len(places)} workers needs a GPU of its own; name as many, each once"
        )
    return tuple(
        WorkerPlan(WorkerId(f"{role}-{number}"), role, gpus[place] if gpus else None)
        for place, (role, number) in enumerate(places)
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
    resolved = settings.model_dump(mode="json", exclude={"dry_run", "api_key", "worker_token"}, exclude_none=True)
    resolved["engine_options"] = dict(plan.engine_options)
    lines = [f"{name}: {json.dumps(value)}" for name, value in resolved.items()]
    endpoint = settings.worker_endpoint or "ipc:// in a private folder"
    lines += [
        "",
        "# processes",
        f"#   server   http://{settings.host}:{settings.port}   workers connect to {endpoint}",
        *_transfer_lines(settings, plan),
        *(_worker_line(settings, worker) for worker in plan.workers),
    ]
    return "\n".join(lines)


def _worker_line(settings: Settings, worker: WorkerPlan) -> str:
    place = "" if worker.device is None else f", on {worker.device}"
    return f"#   {worker.worker_id}   role {worker.role}, engine {settings.engine}{place}"


def _transfer_lines(settings: Settings, plan: Plan) -> list[str]:
    """How KV moves, in a mode in which it does."""
    if len(plan.mode.roles) < 2:
        return []
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
    ) -> None:
        """workers: those of the plan that have a device of their own."""
        self._devices = {worker.worker_id: worker.device for worker in workers if worker.device is not None}
        self._endpoint = endpoint
        self._token = token
        self._log_dir = settings.log_dir or runtime_dir
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._settings_file = runtime_dir / "settings.json"
        content = settings.model_dump(mode="json", exclude=_NOT_FOR_WORKERS, exclude_none=True)
        self._settings_file.write_text(json.dumps(content | {"model": str(model_path)}))

    def spec(self, worker_id: WorkerId, role: Role) -> LaunchSpec:
        argv = (
            *(sys.executable, "-m", "trtserve.server.cli", "worker"),
            *("--config", str(self._settings_file)),
            *("--connect", self._endpoint),
            *("--worker-id", worker_id),
            *("--role", role),
            *("--parent-pid", str(os.getpid())),
            *(("--device", self._devices[worker_id]) if worker_id in self._devices else ()),
        )
        # The file has the settings as resolved; the server's own variables would override it.
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("TRTSERVE_")}
        environment = inherited | {WORKER_TOKEN_VARIABLE: self._token, "PYTHONUNBUFFERED": "1"}
        return LaunchSpec(worker_id, argv, environment, str(self._log_dir / f"{worker_id}.log"))
