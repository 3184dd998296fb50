"""Fill the settings in: flags > environment > YAML file > defaults, all errors at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource

from trtserve.settings.catalog import find_profile, nearest_names
from trtserve.settings.schema import Settings, WorkerSettings

ALIASES = {
    "max-model-len": "max-seq-len",
    "max-batch-size": "max-num-seqs",
    "max-num-batched-tokens": "max-num-tokens",
    "tokens-per-block": "block-size",
    "kv-block-size": "block-size",
    "engine-option": "engine-options",
    "router-option": "router-options",
    "backend": "engine",
}
"""Other servers' names for the same things, so that a command line can be pasted."""

OPTION_ALIASES = {
    "extra-llm-api-options": "extra_llm_api_options",
    "tensor-parallel-size": "tensor_parallel_size",
    "tp-size": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "pp-size": "pipeline_parallel_size",
    "ep-size": "moe_expert_parallel_size",
    "kv-cache-free-gpu-memory-fraction": "kv_cache_free_gpu_memory_fraction",
    "free-gpu-memory-fraction": "kv_cache_free_gpu_memory_fraction",
}
"""Flags of trtllm-serve that are engine options here: `--tp-size 4` is `--engine-options tensor_parallel_size=4`."""

PREFIX = "TRTSERVE_"

SECRETS = ("api-key", "worker-token")
"""Never accepted as flags: every user of the machine can read a command line."""

AnySettings = TypeVar("AnySettings", bound=Settings)


class SettingsError(Exception):
    """The settings are wrong; the text names every bad field, its value and its limit."""


def load_settings(model: type[AnySettings], arguments: Sequence[str]) -> AnySettings:
    """`arguments` without the program's and the subcommand's name; the environment is os.environ.

    Raises SettingsError, or SystemExit for --help and for flags that do not exist (exit code 2, as argparse has it).
    """
    flags, config_path = _take_config(normalise(arguments))
    config_path = config_path or os.environ.get("TRTSERVE_CONFIG")
    from_file = read_config(config_path) if config_path else {}
    layered = _with_sources(model, flags, from_file)
    unknown = _unknown_variables()
    try:
        settings = layered()  # type: ignore[call-arg]  # the sources bring the fields
    except ValidationError as error:
        raise SettingsError("\n".join(_heading([*describe(error, config_path), *unknown]))) from None
    if unknown:
        raise SettingsError("\n".join(_heading(unknown)))
    transfer = _transfer_of_the_environment()
    if transfer is not None and "transfer" not in settings.model_fields_set:
        settings = settings.model_copy(update={"transfer": transfer})
        settings.model_fields_set.discard("transfer")  # so that it can be told from a setting
    return settings


TRANSFER_VARIABLES = {"TRTLLM_USE_UCX_KVCACHE": "ucx", "TRTLLM_USE_NIXL_KVCACHE": "nixl"}
"""By which TensorRT-LLM's own examples choose the KV transfer; 1 means yes. A setting of ours comes first."""


def _transfer_of_the_environment() -> str | None:
    """Raises SettingsError where two are asked for."""
    asked = [name for name in TRANSFER_VARIABLES if os.environ.get(name, "0") == "1"]
    if len(asked) > 1:
        raise SettingsError(f"{' and '.join(asked)} are both 1; set one of them, or --transfer")
    return TRANSFER_VARIABLES[asked[0]] if asked else None


def _unknown_variables() -> list[str]:
    """A misspelt variable must not be ignored. Variables of the project's own tests are left alone."""
    known = {name.upper() for name in WorkerSettings.model_fields} | {"CONFIG"}
    names = (name for name in os.environ if name.upper().startswith(PREFIX) and not name.startswith(f"{PREFIX}TEST_"))
    return [
        f"  {name}: no such setting (environment variable)"
        for name in sorted(names)
        if name.upper().removeprefix(PREFIX).partition("__")[0] not in known
    ]


def _heading(lines: list[str]) -> list[str]:
    return [f"{len(lines)} bad setting{'s' if len(lines) > 1 else ''}:", *lines]


def normalise(arguments: Sequence[str]) -> list[str]:
    """`--Served_Model-name=x` → `--served-model-name=x`, aliases resolved, secrets refused."""
    flags: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--":
            return [*flags, argument, *pending]
        if not argument.startswith("--"):
            flags.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("_", "-")
        name = ALIASES.get(name, name)
        if name in OPTION_ALIASES:
            value = value if equals else next(pending, "")
            flags.append(f"--engine-options={OPTION_ALIASES[name]}={value}")
            continue
        if name in SECRETS:
            variable = "TRTSERVE_" + name.replace("-", "_").upper()
            raise SettingsError(f"--{name}: secrets do not belong on a command line; use --{name}-file or {variable}")
        flags.append(f"--{name}{equals}{value}")
    return flags


def _take_config(flags: list[str]) -> tuple[list[str], str | None]:
    rest: list[str] = []
    path = None
    pending = iter(flags)
    for flag in pending:
        if flag == "--config":
            path = next(pending, None)
            if path is None:
                raise SettingsError("--config: needs the path of a YAML file, or a profile's name")
        elif flag.startswith("--config="):
            path = flag.removeprefix("--config=")
        else:
            rest.append(flag)
    return rest, path


def read_config(path: str) -> dict[str, Any]:
    """A YAML file's mapping, or a shipped profile's where there is no such file, with the flags' names as keys. Raises
    SettingsError."""
    profile = None if Path(path).is_file() else find_profile(path)
    try:
        content = yaml.safe_load(Path(path).read_text() if profile is None else profile.text)
    except OSError as error:
        meant = f", and no profile; `trtserve profiles` lists them{_or_meant(path)}"
        raise SettingsError(f"--config {path}: {error.strerror}{meant}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: must hold a mapping of settings, not a {type(content).__name__}")
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = _field_name(str(key))
        if name in settings:
            raise SettingsError(f"--config {path}: {key} sets {name.replace('_', '-')}, which it has set before")
        settings[name] = value
    return settings


def _or_meant(name: str) -> str:
    names = nearest_names(name)
    return f" (perhaps {', '.join(names)})" if names else ""


def _field_name(key: str) -> str:
    dashed = key.replace("_", "-")
    return ALIASES.get(dashed, dashed).replace("-", "_")


class _FileSource(PydanticBaseSettingsSource):
    """The YAML file's content, read before."""

    def __init__(self, model: type[BaseSettings], content: dict[str, Any]) -> None:
        super().__init__(model)
        self._content = content

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._content.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._content


def _with_sources(model: type[AnySettings], flags: list[str], from_file: dict[str, Any]) -> type[AnySettings]:
    """The model with its sources bound to one command line and one file."""

    class Layered(model):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line: CliSettingsSource[Any] = CliSettingsSource(
                settings_cls, cli_parse_args=flags, cli_prog_name="trtserve", cli_exit_on_error=True
            )
            return command_line, EnvSettingsSource(settings_cls), _FileSource(settings_cls, from_file)

    Layered.__name__ = model.__name__
    Layered.__doc__ = model.__doc__
    return Layered


def describe(error: ValidationError, config_path: str | None) -> list[str]:
    """Every bad field on a line of its own: path, what is wrong, the value that was given."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]).replace("_", "-") or "settings"
        if item["type"] == "extra_forbidden":
            lines.append(f"  {path}: no such setting{f' (in {config_path}?)' if config_path else ''}")
        elif item["type"] == "missing":
            lines.append(f"  {path}: is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            is_secret = any(str(part).replace("_", "-") in SECRETS for part in item["loc"])
            value = "" if item["loc"] == () or is_secret else f" (got {item['input']!r:.100})"
            lines.append(f"  {path}: {message}{value}")
    return lines
