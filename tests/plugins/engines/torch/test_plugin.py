"""The hook module: light to import, and clear about what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from trtserve.plugins.api import Engine, EngineConfig
from trtserve.plugins.engines import torch as plugin


def test_importing_the_plugin_imports_nothing_heavy():
    code = (
        "import sys, trtserve.plugins.engines.torch as plugin\n"
        "assert plugin.missing('engine', 'torch') is None\n"
        "assert plugin.options_model('engine', 'torch')().num_threads is None\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_it_makes_its_own_engine_only():
    assert plugin.make_engine("sim", EngineConfig("")) is None
    assert isinstance(plugin.make_engine("torch", EngineConfig("")), Engine)
    assert plugin.options_model("engine", "sim") is None
    assert plugin.options_model("policy", "torch") is None


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(plugin, "find_spec", lambda name: None if name == "transformers" else object())
    assert plugin.missing("engine", "torch") == "the torch engine needs transformers: pip install 'trtserve[embedded]'"
    assert plugin.missing("mode", "torch") is None


def test_unknown_options_are_refused():
    with pytest.raises(ValidationError, match="num_thread"):
        plugin.make_engine("torch", EngineConfig("", options={"num_thread": 2}))
