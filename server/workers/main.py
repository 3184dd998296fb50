"""The worker process: settings to an engine, and the engine to the server."""

from __future__ import annotations

import os
import secrets
import signal
from importlib.metadata import version
from pathlib import Path

from trtserve.plugins.api import Engine, Role, WorkerId
from trtserve.plugins.manager import PluginManager
from trtserve.server.console import say
from trtserve.server.exit_codes import ExitCode
from trtserve.server.memory import settle
from trtserve.server.model.folder import ModelFolder, open_folder
from trtserve.server.workers import wire
from trtserve.server.workers.engine_config import engine_config, take_environment, with_engine_defaults
from trtserve.server.workers.kv_setup import exchange_options
from trtserve.server.workers.orphan import die_with_parent
from trtserve.server.workers.token import worker_token
from trtserve.server.workers.worker import Worker, WorkerIdentity
from trtserve.settings.dry_run import resolved_settings, yaml_lines
from trtserve.settings.schema import WorkerSettings


def run_worker(settings: WorkerSettings) -> int:
    """Run until the server or a signal ends it; returns the exit code.

    Raises SettingsError, PluginError or ModelError for what the user has to mend.
    """
    if settings.parent_pid is not None:
        die_with_parent(settings.parent_pid)
    manager = PluginManager()
    settings = with_engine_defaults(settings, manager)
    if settings.dry_run:
        say(_describe(settings, manager))
        return ExitCode.OK
    folder = _model_folder(settings)
    config = engine_config(settings, settings.engine_role or settings.role, str(folder.path), manager)
    if settings.parent_pid is None:
        take_environment(manager.plan_engine(settings.engine, config), settings.gpus)

    def make_engine() -> Engine:
        return manager.make_engine(settings.engine, config)

    identity = _identity(settings, folder)
    kv = exchange_options(settings, identity.hello, manager)
    worker = Worker(identity, make_engine, settings.warm_up_timeout, kv, settle)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: worker.stop())
    return worker.run()


def _describe(settings: WorkerSettings, manager: PluginManager) -> str:
    """What --dry-run prints, as the server does: YAML that can be used as --config."""
    config = engine_config(settings, settings.engine_role or settings.role, settings.model, manager)
    return "\n".join(
        [
            *yaml_lines(resolved_settings(settings, config.options)),
            *("", "# processes"),
            f"#   {settings.worker_id}   role {settings.role}, engine {settings.engine}, to {settings.connect}",
        ]
    )


def _identity(settings: WorkerSettings, folder: ModelFolder) -> WorkerIdentity:
    fingerprints = folder.fingerprints()
    hello = wire.Hello(
        wire_version=wire.WIRE_VERSION,
        worker_id=WorkerId(settings.worker_id),
        incarnation=secrets.randbits(63),
        token=worker_token(settings),
        pid=os.getpid(),
        role=Role(settings.role),
        engine=settings.engine,
        model_fingerprint=fingerprints.model,
        tokenizer_fingerprint=fingerprints.tokenizer,
        trtserve_version=version("trtserve"),
    )
    return WorkerIdentity(hello, settings.connect, settings.connect_timeout)


def _model_folder(settings: WorkerSettings) -> ModelFolder:
    path = Path(settings.model)
    if path.is_dir():
        return open_folder(path, path.name)
    # Started by hand, perhaps on another machine: find the model as the server does.
    from trtserve.server.model.resolve import resolve_model

    return resolve_model(settings.model, settings.cache_dir)
