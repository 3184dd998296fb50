"""Plugins are found without being imported, and one that cannot be used says why and what to do."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from trtserve.plugins.api import EngineConfig, ModeConfig, Role
from trtserve.plugins.hooks import GROUP
from trtserve.plugins.manager import KINDS, PluginError, PluginManager
from trtserve.plugins.routing_api import PolicyConfig

METADATA = "Metadata-Version: 2.1\nName: outsiders\nVersion: 1.0\n"

OUTSIDER = """
from pydantic import BaseModel, Field
from trtserve.plugins.hooks import hookimpl

class Options(BaseModel, extra="forbid"):
    level: int = Field(1, ge=1, le=9, description="how much")
    name: str = Field("x", description="what")

@hookimpl
def make_policy(name, config):
    return object() if name == "outsider" else None

@hookimpl
def options_model(kind, name):
    return Options if (kind, name) == ("policy", "outsider") else None

@hookimpl
def missing(kind, name):
    return "engine needy needs a GPU: buy one" if (kind, name) == ("engine", "needy") else None
"""


@pytest.fixture
def outsiders(tmp_path, monkeypatch):
    """A distribution of somebody else's with good and bad plugins; the manager that sees it."""
    info = tmp_path / "outsiders-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\npolicy.outsider = outsider_plugin\nengine.needy = outsider_plugin\n"
        "engine.broken = broken_plugin\nengine.lost = no_such_module_anywhere\nmode.mute = outsider_plugin:Options\n"
    )
    (tmp_path / "outsider_plugin.py").write_text(OUTSIDER)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no driver on this machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield PluginManager()
    sys.modules.pop("outsider_plugin", None)


def test_ours_are_found():
    manager = PluginManager()
    assert {"sim", "torch"} <= set(manager.names("engine"))
    assert {"random", "round_robin", "least_loaded"} <= set(manager.names("policy"))
    assert "agg" in manager.names("mode") and "local" in manager.names("launcher")


def test_finding_and_making_import_only_what_is_needed():
    program = (
        "import sys\n"
        "from trtserve.plugins.manager import PluginManager, KINDS\n"
        "from trtserve.plugins.routing_api import PolicyConfig\n"
        "manager = PluginManager()\n"
        "[manager.names(kind) for kind in KINDS]\n"
        "assert not [name for name in sys.modules if name.startswith('trtserve.plugins.engines')]\n"
        "manager.make_policy('random', PolicyConfig())\n"
        "manager.check_options('engine', 'sim', {})\n"
        "manager.problem('engine', 'torch')\n"
        "found = set(sys.modules)\n"
        "assert 'trtserve.plugins.policies.round_robin' not in found\n"
        "assert not found & {'torch', 'transformers', 'numpy'}, found & {'torch', 'transformers', 'numpy'}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_every_plugin_of_ours_loads_and_makes_something():
    manager = PluginManager()
    rows = [row for row in manager.statuses() if row.package == "trtserve"]
    assert {row.kind for row in rows} <= set(KINDS)
    assert {f"{row.kind}.{row.name}" for row in rows} == {
        point.name for point in entry_points(group=GROUP) if point.dist is not None and point.dist.name == "trtserve"
    }
    assert manager.make_mode("agg", ModeConfig(3, 1, 1)).roles == {Role.AGG: 3}
    assert manager.make_launcher("local") is not None
    for name in ("random", "round_robin", "least_loaded"):
        assert manager.make_policy(name, PolicyConfig()) is not None
    engine = manager.make_engine("sim", EngineConfig(""))
    engine.close()


def test_an_unknown_name_tells_what_is_there():
    with pytest.raises(PluginError, match=r"there is no policy 'fastest'; there are: .*least_loaded, random"):
        PluginManager().make_policy("fastest", PolicyConfig())


def test_what_a_plugin_lacks_matters_where_it_is_made_and_not_where_it_is_planned(outsiders):
    assert outsiders.load_problem("engine", "needy") is None
    assert outsiders.check_options("engine", "needy", {}) == {}
    assert outsiders.plan_engine("needy", EngineConfig("")) is None
    assert outsiders.missing("engine", "needy") == "engine needy needs a GPU: buy one"


def test_somebody_elses_plugin_is_like_ours(outsiders):
    assert "outsider" in outsiders.names("policy")
    assert outsiders.make_policy("outsider", PolicyConfig()) is not None
    assert next(row for row in outsiders.statuses() if row.name == "outsider").package == "outsiders"


def test_a_plugin_that_cannot_be_used_says_why(outsiders):
    assert outsiders.problem("engine", "needy") == "engine needy needs a GPU: buy one"
    with pytest.raises(PluginError, match="buy one"):
        outsiders.make_engine("needy", EngineConfig(""))
    broken = outsiders.problem("engine", "broken")
    assert broken == "engine broken cannot be loaded: RuntimeError: no driver on this machine"
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in outsiders.problem("engine", "lost")


def test_one_broken_plugin_does_not_hide_the_others(outsiders):
    problems = {f"{row.kind}.{row.name}": row.problem for row in outsiders.statuses()}
    assert problems["engine.broken"] and problems["engine.needy"]
    assert problems["engine.sim"] is None and problems["policy.outsider"] is None


def test_a_plugin_that_makes_nothing_is_found_out(outsiders):
    with pytest.raises(PluginError, match=r"mode\.mute did not make anything"):
        outsiders.make_mode("mute", ModeConfig(1, 1, 1))


def test_options_are_converted_and_filled_in(outsiders):
    assert outsiders.check_options("policy", "outsider", {"level": "4"}) == {"level": 4, "name": "x"}


def test_every_bad_option_is_named(outsiders):
    with pytest.raises(PluginError) as caught:
        outsiders.check_options("policy", "outsider", {"level": "99", "colour": 1})
    text = str(caught.value)
    assert text.startswith("bad options for policy outsider:")
    assert "router-options.level: Input should be less than or equal to 9 (got '99')" in text and "colour" in text


def test_a_plugin_without_options_takes_none(outsiders):
    assert outsiders.check_options("policy", "random", {}) == {}
    with pytest.raises(PluginError, match="policy random takes no options, got a, b"):
        outsiders.check_options("policy", "random", {"b": 1, "a": 2})
