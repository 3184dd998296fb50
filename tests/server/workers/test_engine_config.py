"""Settings to an engine's configuration, and what a worker that was started by hand does for itself."""

from __future__ import annotations

import os
import runpy
import sys

import pytest

from trtserve.plugins.api import EnginePlan, Role
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server import cli
from trtserve.server.workers.engine_config import engine_config, take_environment, with_engine_defaults
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


@pytest.mark.parametrize(
    ("given", "block_size"),
    [({"engine": "sim"}, 16), ({"engine": "tensorrt_llm"}, 32), ({"engine": "tensorrt_llm", "block_size": 64}, 64)],
)
def test_what_nobody_gave_is_the_engines_to_say(given, block_size):
    settings = with_engine_defaults(Settings(**given, _cli_parse_args=[]), PluginManager())
    assert settings.block_size == block_size


def test_a_worker_by_hand_takes_its_environment(monkeypatch):
    for name in ("LEFT", "GONE", "CHANGED", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    plan = EnginePlan(1, {"CHANGED": "2"}, ("GONE", "NEVER_THERE"))
    take_environment(None, "7")
    take_environment(plan, None)
    assert [os.environ.get(name) for name in ("LEFT", "GONE", "CHANGED", "CUDA_VISIBLE_DEVICES")] == [
        "1",
        None,
        "2",
        "1",
    ]
    take_environment(plan, "4,5")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_a_main_module_that_is_read_again_starts_nothing(monkeypatch):
    """As MPI ranks of an engine do it."""
    monkeypatch.setattr(sys, "argv", ["trtserve", "worker", "--no-such-flag"])
    runpy.run_path(cli.__file__, run_name="__worker__")
    with pytest.raises(SystemExit):
        runpy.run_path(cli.__file__, run_name="__main__")
