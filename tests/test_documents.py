"""README.md and docs/: commands can be typed as they stand, links lead somewhere, names are the code's."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest

from trtserve.plugins.manager import PluginManager
from trtserve.server.cli import main
from trtserve.settings.load import load_settings
from trtserve.settings.names import ALIASES, OPTION_ALIASES
from trtserve.settings.schema import WorkerSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}

FOREIGN_FLAGS = {
    *("--build-arg", "--framework", "--ipc", "--platform", "--rm", "--service-name", "--target", "--ulimit"),
    *("--index-url", "--no-deps", "--mpi", "--ntasks-per-node", "--extra_llm_api_options", "--help"),
}
"""Of docker, pip, srun and the programs that trtserve is compared with."""

_NO_COMMAND = re.compile(r"…|--engine echo|--help|version$|replay$")


def commands() -> list[str]:
    """What is said to be typed, each once: lines of code that begin with `trtserve`, what is behind the image's name in
    `docker run`, spans in a text. What has an ellipsis is no command; the engine of docs/plugins.md is not there."""
    found: dict[str, None] = {}
    for text in TEXTS.values():
        fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        indented = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
        lines = [line.removeprefix("$ ") for line in [*"".join(fenced).splitlines(), *indented]]
        lines += [f"trtserve {line.partition(' trtserve ')[2]}" for line in indented if line.startswith("docker run")]
        for line in [*lines, *re.findall(r"`(trtserve [^`\n]+)`", text)]:
            command = line.partition("  #")[0].strip()
            if re.match(r"trtserve( |$)", command) and not _NO_COMMAND.search(command):
                found[command.replace(" N ", " 4 ").replace("NAME", "kv")] = None
    return list(found)


@cache
def source() -> str:
    """All that a flag could be defined in."""
    folders = ("server", "plugins", "settings", "bench")
    return "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """A folder with the files that the documents speak of, and no variables."""
    for name in os.environ:
        if name.upper().startswith(("TRTSERVE_", "TRTLLM_USE_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name in ("serve.yaml", "extra.yaml"):
        Path(name).write_text("{}")
    Path("token").write_text("0" * 64)


def test_there_are_commands():
    assert len(commands()) > 30 and "trtserve" in commands()


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command, typed, capsys):
    _, *arguments = shlex.split(command)
    match arguments:
        case ["worker", *rest]:
            load_settings(WorkerSettings, rest)
        case ["replay", *_]:
            assert main(arguments) == 2
            assert "No such file" in capsys.readouterr().err
        case ["plugins" | "profiles" | "version" | "--version"]:
            assert main(arguments) == 0
        case _:
            assert main([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[document]):
        assert ((ROOT / document).parent / target).exists(), target


@pytest.mark.parametrize("document", TEXTS)
def test_flags_and_variables_are_there(document):
    for flag in sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXTS[document])) - FOREIGN_FLAGS):
        name = ALIASES.get(flag[2:], flag[2:])
        is_setting = name in OPTION_ALIASES or name.replace("-", "_") in {*WorkerSettings.model_fields, "config"}
        assert is_setting or f'"{flag}"' in source(), flag
    for variable in set(re.findall(r"\bTRTSERVE_(?!TEST_)[A-Z_]*[A-Z]", TEXTS[document])):
        name = variable.removeprefix("TRTSERVE_").partition("__")[0].lower()
        assert name in {*WorkerSettings.model_fields, "config"}, variable


@pytest.mark.parametrize("document", TEXTS)
def test_files_of_the_project_are_there(document):
    folders = "server|plugins|settings|tests|bench|docs"
    for name in set(re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/]+\.(?:py|md|yaml)\b", TEXTS[document])):
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name


@pytest.mark.parametrize(
    ("kind", "name", "document"),
    [
        ("engine", "sim", "docs/simulated_engine.md"),
        ("engine", "tensorrt_llm", "docs/profiles.md"),
        ("engine", "torch", "docs/torch_engine.md"),
        ("policy", "kv", "docs/routing.md"),
    ],
)
def test_every_option_is_told(kind, name, document):
    options = PluginManager().check_options(kind, name, {})
    assert options and [option for option in options if not re.search(rf"\b{option}\b", TEXTS[document])] == []


def test_the_layers_are_those_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == ["trtserve.server"])
    drawn = TEXTS["docs/architecture.md"].partition("\ntrtserve.server\n")[2].partition("```")[0]
    drawn = re.sub(r" {3,}these three .*", "", drawn)
    parts = [set(re.findall(r"\w+", layer)) for layer in drawn.split("◀")]
    assert parts == [set(re.findall(r"\w+", layer)) for layer in reversed(layers)]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python bench/(\w+)\.py", "\n".join(TEXTS.values())))))
def test_a_measurement_is_there(name):
    assert (ROOT / "bench" / f"{name}.py").is_file()


def test_the_tree_has_every_module_of_the_upper_level():
    tree = TEXTS["docs/architecture.md"].partition("## The tree")[2].partition("\n## ")[0]
    folders = [ROOT / "settings", ROOT / "plugins", ROOT / "server", ROOT / "server" / "router"]
    modules = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if not re.search(rf"\b{name}\b", tree)] == []
