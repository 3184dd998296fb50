"""`trtserve [serve] [MODEL] …`, `worker …`, `replay TRACE …`, `plugins`, `profiles`: flags to settings, settings to a
run."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server.console import say, say_error
from trtserve.server.descriptors import allow_many_descriptors, open_standard_descriptors
from trtserve.server.exit_codes import ExitCode
from trtserve.settings.catalog import profiles
from trtserve.settings.errors import SettingsError
from trtserve.settings.load import load_settings
from trtserve.settings.schema import Settings, WorkerSettings

_COMMANDS = ("serve", "worker", "replay", "plugins", "profiles", "version")
_ALONE = {
    "plugins": "what is installed, and why something cannot be used",
    "profiles": "the settings files that are shipped, for --config NAME",
    "version": "the version",
}
"""Commands that take no arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    open_standard_descriptors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given.pop(0) if given and given[0] in _COMMANDS else "serve"
    if command == "serve" and given[:1] == ["--version"]:
        command, given = "version", given[1:]
    try:
        if command in _ALONE and given:
            return _alone(command, given)
        match command:
            case "worker":
                return _worker(given)
            case "replay":
                from trtserve.server.replay.command import main as replay

                return replay(given)
            case "plugins":
                return _plugins()
            case "profiles":
                return _profiles()
            case "version":
                say(version("trtserve"))
                return ExitCode.OK
            case _:
                return _serve(given)
    except (SettingsError, PluginError) as error:
        say_error(f"trtserve: {error}")
        return ExitCode.USAGE


def _serve(arguments: list[str]) -> int:
    settings = load_settings(Settings, arguments)
    _log_to_stderr(settings.log_level)
    api_keys = read_api_keys(settings)
    manager = PluginManager()
    # Imported late: `trtserve plugins` and workers need none of it.
    from trtserve.server.deployment import describe_plan, make_plan, with_usable_transfer
    from trtserve.server.workers.engine_config import with_engine_defaults

    settings = with_engine_defaults(with_usable_transfer(settings, manager), manager)
    plan = make_plan(settings, manager)
    if settings.dry_run:
        say(describe_plan(settings, plan))
        return ExitCode.OK
    import uvloop

    from trtserve.server.app import Server
    from trtserve.server.http import AddressError, bind
    from trtserve.server.memory import keep_free_memory_small
    from trtserve.server.model.errors import ModelError
    from trtserve.server.model.progress import ProgressBar
    from trtserve.server.model.resolve import resolve_model
    from trtserve.server.workers.link import EndpointError

    keep_free_memory_small()
    allow_many_descriptors()
    try:
        bound = bind(settings.host, settings.port)
    except AddressError as error:
        say_error(f"trtserve: {error}")
        return ExitCode.ADDRESS
    # Until the server's loop takes it over: what was half made of a model goes, and so do the processes that make it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ProgressBar() as progress:
            folder = resolve_model(settings.model, settings.cache_dir, progress)

        async def run() -> ExitCode:
            return await Server(settings, plan, manager, folder, api_keys, bound).run()

        return uvloop.run(run())
    except ModelError as error:
        say_error(f"trtserve: {error}")
        return ExitCode.MODEL
    except EndpointError as error:
        say_error(f"trtserve: {error}")
        return ExitCode.ADDRESS
    except KeyboardInterrupt:
        return ExitCode.OK
    finally:
        bound.close()


def _worker(arguments: list[str]) -> int:
    from trtserve.server.model.errors import ModelError
    from trtserve.server.workers.main import run_worker

    settings = load_settings(WorkerSettings, arguments)
    _log_to_stderr(settings.log_level)
    try:
        return run_worker(settings)
    except ModelError as error:
        say_error(f"trtserve: {error}")
        return ExitCode.USAGE


def _alone(command: str, given: list[str]) -> int:
    if given[0] in ("-h", "--help"):
        say(f"trtserve {command}: {_ALONE[command]}")
        return ExitCode.OK
    raise SettingsError(f"{command} takes no arguments, and {given[0]} was given")


def _plugins() -> int:
    for status in PluginManager().statuses():
        say(f"{status.kind:9} {status.name:16} {status.package:20} {status.problem or 'ok'}")
    return ExitCode.OK


def _profiles() -> int:
    for profile in profiles():
        say(f"{profile.name:33} {profile.summary}")
    return ExitCode.OK


def read_api_keys(settings: Settings) -> list[str]:
    """From the environment and the file, one a line. Raises SettingsError."""
    keys = [] if settings.api_key is None else [settings.api_key.get_secret_value().strip()]
    path = settings.api_key_file
    if path is not None:
        keys += _keys_of(path)
    return keys


def _keys_of(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--api-key-file {path}: cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines, 1):
        if line in keys and len(line.split()) > 1:
            raise SettingsError(f"--api-key-file {path}: line {number} has a blank within; write one key a line")
    if not keys:
        # An empty file must not open the server to everybody.
        raise SettingsError(f"--api-key-file {path}: holds no key; write one a line")
    return keys


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )


if __name__ == "__main__":
    sys.exit(main())
