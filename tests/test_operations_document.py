"""docs/operations.md: what it says instead of the original example's commands can be typed as it is."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from trtserve.server.cli import main
from trtserve.settings.load import load_settings
from trtserve.settings.names import ALIASES, OPTION_ALIASES
from trtserve.settings.schema import WorkerSettings

DOCUMENT = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.partition("| there | here |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
OURS = [span for row in TABLE for span in re.findall(r"`([^`]+)`", row.split(" | ", 1)[1])]
COMMANDS = [span for span in OURS if span.startswith("trtserve ")]
FLAGS = sorted({flag for span in OURS if not span.startswith("docker") for flag in re.findall(r"--[a-z-]+", span)})


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in os.environ:
        if name.upper().startswith(("TRTSERVE_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


def test_every_kind_of_line_is_there():
    assert len(TABLE) > 20 and len(COMMANDS) > 15 and "--extra-llm-api-options" in FLAGS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, capsys):
    _, *arguments = shlex.split(command)
    if arguments[0] == "worker":
        settings = load_settings(WorkerSettings, arguments[1:])
        assert settings.engine == "tensorrt_llm" and settings.worker_id == f"{settings.role}-a"
    else:
        assert main([*arguments, "--dry-run"]) == 0
        assert "# tensorrt_llm of a worker with role" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag != "--build-arg"])
def test_a_flag_is_there(flag):
    name = ALIASES.get(flag[2:], flag[2:])
    assert name in OPTION_ALIASES or name.replace("-", "_") in {*WorkerSettings.model_fields, "config"}
