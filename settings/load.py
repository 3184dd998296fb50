"""Fill the settings in: flags > environment > YAML file > defaults, all errors at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource
from pydantic_settings import SettingsError as SourceError

from trtserve.settings.config_file import read_config
from trtserve.settings.errors import SettingsError
from trtserve.settings.names import SECRETS, normalise
from trtserve.settings.schema import MAPPINGS, SECTIONS, Settings, WorkerSettings

PREFIX = "TRTSERVE_"

AnySettings = TypeVar("AnySettings", bound=Settings)


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


_ALSO = """--config FILE has settings of these names in YAML, or is the name of a profile; TRTSERVE_ and a name is a
variable; - and _ are alike. Other commands: trtserve worker, trtserve replay, trtserve plugins, trtserve profiles,
trtserve version."""

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
    nested = {name.upper() for name in SECTIONS | MAPPINGS}
    names = (name for name in os.environ if name.upper().startswith(PREFIX) and not name.startswith(f"{PREFIX}TEST_"))
    unknown = []
    for name in sorted(names):
        head, separator, _ = name.upper().removeprefix(PREFIX).partition("__")
        if head not in (nested if separator else known):
            unknown.append(f"  {name}: no such setting (environment variable)")
    return unknown


def _heading(lines: list[str]) -> list[str]:
    return [f"{len(lines)} bad setting{'s' if len(lines) > 1 else ''}:", *lines]


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


class _Variables(EnvSettingsSource):
    """A mapping that cannot be read stays a text, so that validation names it along with whatever else is wrong."""

    def decode_complex_value(self, field_name: str, field: Any, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


class _Flags(_Variables, CliSettingsSource[Any]):
    """As variables."""

    def _merge_parsed_list(self, parsed_list: list[str], field_name: str) -> str:
        try:
            return super()._merge_parsed_list(parsed_list, field_name)
        except SourceError:
            return ", ".join(parsed_list)


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
            command_line = _Flags(settings_cls, cli_parse_args=flags, cli_prog_name="trtserve", cli_exit_on_error=True)
            return command_line, _Variables(settings_cls), _FileSource(settings_cls, from_file)

    Layered.__name__ = model.__name__
    Layered.__doc__ = f"{model.__doc__} {_ALSO}"  # what --help begins with
    return Layered


_MAPPING_TYPES = ("dict_type", "model_type")
_NO_MAPPING = "must be names with values: name=value as a flag, a JSON object as a variable, a mapping in YAML"


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
            message = _NO_MAPPING if item["type"] in _MAPPING_TYPES else item["msg"].removeprefix("Value error, ")
            is_secret = any(str(part).replace("_", "-") in SECRETS for part in item["loc"])
            value = "" if item["loc"] == () or is_secret else f" (got {item['input']!r:.100})"
            lines.append(f"  {path}: {message}{value}")
    return lines
