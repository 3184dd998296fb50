"""The decision log: whole records, and the server never waits for its disk."""

from array import array
from pathlib import Path

import msgspec
import pytest

from trtserve.plugins.api import EngineInfo, Request, RequestId, Role, SamplingParams, WorkerId
from trtserve.plugins.blocks import block_hashes
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.router.core import RoutingCore
from trtserve.server.router.decision_log import DecisionLog, DecisionRecord


def decide(recorder, count=3):
    core = RoutingCore(PluginManager().make_policy("kv", PolicyConfig()), recorder=recorder)
    for name in ("a", "b"):
        core.add_worker(WorkerId(name), Role.AGG, EngineInfo(4, 100, 8, 64, 4096, 1000))
    bookings = []
    for number in range(1, count + 1):
        prompt = array("i", range(20))
        hashes = block_hashes(prompt, 4)
        core.hold(Request(RequestId(number), prompt, SamplingParams(10), block_hashes=hashes), Role.AGG, 1.0)
        bookings += core.plan(Role.AGG, 1.0)
    return bookings


def test_a_record_says_what_the_policy_saw_and_said(tmp_path):
    path = tmp_path / "decisions.jsonl"
    with DecisionLog(path, "kv") as log:
        bookings = decide(log)
    lines = path.read_bytes().splitlines()
    records = [msgspec.json.decode(line, type=DecisionRecord) for line in lines]
    assert len(records) == len(bookings) == 3
    assert [record.assignments[0].worker_id for record in records] == [one.worker_id for one in bookings]
    first, second, _ = records
    assert (first.policy, first.role, first.now_s) == ("kv", Role.AGG, 1.0)
    assert [(one.prompt_tokens, one.max_tokens, one.overlaps) for one in first.held] == [(20, 10, {})]
    assert second.held[0].overlaps == {0: 5}
    assert [view.booked_requests for view in second.workers] == [1, 0]


def test_it_appends(tmp_path):
    path = tmp_path / "decisions.jsonl"
    for _ in range(2):
        with DecisionLog(path, "kv") as log:
            decide(log, 1)
    assert len(path.read_bytes().splitlines()) == 2


def test_what_the_disk_cannot_take_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("trtserve.server.router.decision_log._MOST_WAITING", 2)
    log = DecisionLog(tmp_path / "decisions.jsonl", "kv")  # not entered: nothing writes
    decide(log, 5)
    assert log.dropped == 3
    with log:
        pass
    assert len((tmp_path / "decisions.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("number", [1, 100])
def test_a_disk_that_is_full_is_told_and_ends_nothing(number, caplog):
    with DecisionLog(Path("/dev/full"), "kv") as log:
        decide(log, number)
    assert caplog.text.count("cannot be written any more") == 1
