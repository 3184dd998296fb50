"""A process without settings of its own, and one call that gives it some of every kind."""

import os

import pytest
import yaml

from trtserve.settings.load import load_settings
from trtserve.settings.schema import Settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("TRTSERVE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path):
    """Settings from flags, variables (without the prefix) and a YAML mapping or text."""

    def load(*flags, variables=None, file=None, model=Settings):
        arguments = list(flags)
        if file is not None:
            path = tmp_path / "settings.yaml"
            path.write_text(file if isinstance(file, str) else yaml.safe_dump(file))
            arguments += ["--config", str(path)]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (variables or {}).items():
                patch.setenv(f"TRTSERVE_{name}", str(value))
            return load_settings(model, arguments)

    return load
