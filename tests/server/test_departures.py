"""From a cancellation until nothing is held, with workers that let go when a test says so."""

import pytest

from trtserve.plugins.api import RequestId
from trtserve.server.departures import Departures

ONE = RequestId(1)


class Observed(list):
    observe = list.append


class Holder:
    """A worker that holds the request, or does not."""

    def __init__(self, holds=True):
        self.holds = holds

    def when_let_go(self, request_id, let_go):
        self.let_go = let_go
        return self.holds


@pytest.fixture
def times():
    return {phase: Observed() for phase in ("queued", "prefill", "hand_over", "decode")}


@pytest.fixture
def departures(times):
    return Departures(times, lambda: 10.0)


@pytest.mark.parametrize(
    ("runs", "has_tokens", "phase"),
    [
        ([], False, "queued"),
        ([True], False, "prefill"),
        ([False], False, "prefill"),
        ([True], True, "hand_over"),
        ([True, False], True, "decode"),
        ([False], True, "decode"),
    ],
)
def test_the_phase(departures, times, runs, has_tokens, phase):
    for moves_on in runs:
        departures.runs(ONE, moves_on)
    departures.over(ONE, 9.5, has_tokens, [Holder(False)])
    assert times.pop(phase) == [0.5] and not any(times.values())


def test_the_last_worker_counts(departures, times):
    departures.runs(ONE, False)
    workers = [Holder(), Holder(False), Holder()]
    departures.over(ONE, 9.0, True, workers)
    workers[2].let_go()
    assert not times["decode"]
    workers[0].let_go()
    assert times["decode"] == [1.0]


def test_what_ended_by_itself_is_not_counted(departures, times):
    departures.runs(ONE, False)
    departures.over(ONE, None, True, [Holder()])
    departures.over(ONE, 9.0, False, [Holder(False)])
    assert times["queued"] == [1.0], "nothing was kept of the first"
