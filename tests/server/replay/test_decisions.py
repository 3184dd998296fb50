"""A decision log put to another policy."""

from array import array

import pytest

from trtserve.plugins.api import EngineInfo, Request, RequestId, Role, SamplingParams, WorkerId
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import (
    Assignment,
    Curve,
    Estimates,
    HeldRequest,
    PassTimes,
    Plan,
    PolicyConfig,
    RoutingState,
    WorkerView,
)
from trtserve.server.replay.command import main
from trtserve.server.replay.decisions import DecisionLogError, compare
from trtserve.server.router.decision_log import DecisionLog

TIMES = PassTimes(Curve(5.0, 0.1, 0.0, 1, 512), Curve(5.0, 20.0, 0.0, 0, 1))


@pytest.fixture
def log(tmp_path):
    """Three requests of 200 tokens, each sent to worker a, which has five of their blocks."""
    info = EngineInfo(16, 2000, 64, 512, 8192, 1000)
    views = [
        WorkerView(WorkerId(name), Role.AGG, info, slot, TIMES, unused_blocks=2000, free_blocks=2000)
        for slot, name in enumerate("ab")
    ]
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, "kv") as recorder:
        for number in (1, 2, 3):
            request = Request(RequestId(number), array("i", [1]) * 200, SamplingParams(10))
            held = HeldRequest(request, Role.AGG, 10.0, lambda: {0: 5})
            plan = Plan([Assignment(request.id, WorkerId("a"))])
            recorder.record([held], RoutingState(10.0 + number, views, Estimates(100.0, 0.5, 60.0)), plan)
    return path


def policy(name):
    return PluginManager().make_policy(name, PolicyConfig())


def test_the_same_policy_decides_the_same(log):
    found = compare(log, policy("kv"))
    assert (found.decisions, found.requests, found.same, found.elsewhere, found.held) == (3, 3, 3, 0, 0)
    assert found.changes == []


def test_another_policy_would_have_lost_the_prefix(log):
    found = compare(log, policy("round_robin"))
    assert found.same + found.elsewhere == 3 and found.elsewhere == len(found.changes) > 0
    assert found.instead_overlap_blocks < found.recorded_overlap_blocks
    change = found.changes[0]
    assert (change.recorded, change.overlap_blocks, change.instead, change.instead_overlap_blocks) == ("a", 5, "b", 0)


def test_the_command_prints_it(log, capsys):
    assert main(["--decisions", str(log), "--router", "round_robin"]) == 0
    printed = capsys.readouterr().out
    assert "3 decisions about 3 requests, put to round_robin" in printed and "a (5 blocks there) -> b (0)" in printed


@pytest.mark.parametrize("line", ["{}", "no json", '{"policy": "kv"}'])
def test_a_line_that_is_no_decision_is_named(log, capsys, line):
    with log.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DecisionLogError, match="line 4"):
        compare(log, policy("kv"))
    assert main(["--decisions", str(log)]) == 2 and "line 4" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["trace", "--decisions", "log"]])
def test_it_is_either_a_trace_or_a_log(flags):
    with pytest.raises(SystemExit, match="2"):
        main(flags)


def test_a_log_that_is_not_there(tmp_path, capsys):
    assert main(["--decisions", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
