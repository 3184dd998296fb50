"""Settings to an engine's configuration, and what a worker that was started by hand does for itself."""

from __future__ import annotations

import os

import pytest

from trtserve.plugins.api import EnginePlan, Role
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server.workers.engine_config import engine_config, take_environment
from trtserve.settings.schema import RoleSettings, Settings


def test_an_engine_is_made_of_its_roles_settings():
    decode = RoleSettings(max_num_tokens=256, engine_options={"start_s": 2})
    settings = Settings(engine="sim", transfer="nixl", engine_options={"speedup": 5}, decode=decode, _cli_parse_args=[])
    manager = PluginManager()
    config = engine_config(settings, "decode", "/m", manager)
    assert (config.role, config.max_num_tokens, config.transfer) == (Role.DECODE, 256, "nixl")
    assert (config.options["speedup"], config.options["start_s"]) == (5.0, 2.0)
    assert engine_config(settings, "prefill", "/m", manager).max_num_tokens is None


def test_bad_options_of_one_role_are_named():
    settings = Settings(engine="sim", decode=RoleSettings(engine_options={"speedup": -1}), _cli_parse_args=[])
    with pytest.raises(PluginError, match=r"engine-options\.speedup"):
        engine_config(settings, "decode", "/m", PluginManager())


def test_a_worker_by_hand_takes_its_environment(monkeypatch):
    for name, value in (("LEFT", "1"), ("GONE", "1"), ("CHANGED", "1")):
        monkeypatch.setenv(name, value)
    take_environment(EnginePlan(1, {"CHANGED": "2", "NEW": "3"}, ("GONE", "NEVER_THERE")))
    seen = {name: os.environ.get(name) for name in ("LEFT", "GONE", "CHANGED", "NEW")}
    monkeypatch.delenv("NEW")
    assert seen == {"LEFT": "1", "GONE": None, "CHANGED": "2", "NEW": "3"}
    take_environment(None)
