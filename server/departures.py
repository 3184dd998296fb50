"""How long a sequence goes on holding something after it was cancelled, for the metrics.

The clock starts when the server notices that nobody wants the answer any more. By the time its task has unwound, its
place in the queue, its booking, leases and fetches are given back; what may be left is the sequence on a worker, which
takes a pass to end there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from trtserve.plugins.api import RequestId
from trtserve.server.instruments import Histogram
from trtserve.server.workers.client import WorkerClient


class Departures:
    """On the event loop. For each sequence: `runs` whenever a worker gets it, `over` once, at its end."""

    def __init__(self, histograms: Mapping[str, Histogram], clock: Callable[[], float] = time.monotonic) -> None:
        """histograms: by phase: queued, prefill, hand_over, decode."""
        self._histograms = histograms
        self._clock = clock
        self._moves_on: dict[RequestId, bool] = {}

    def runs(self, request_id: RequestId, moves_on: bool) -> None:
        """moves_on: only its prompt is computed there, and another worker goes on."""
        self._moves_on[request_id] = moves_on

    def over(
        self, request_id: RequestId, cancelled_s: float | None, has_tokens: bool, workers: Iterable[WorkerClient]
    ) -> None:
        """Its run has ended or was unwound. cancelled_s: when it was cancelled, on the clock; None: it was not."""
        moves_on = self._moves_on.pop(request_id, None)
        if cancelled_s is None:
            return
        histogram = self._histograms[_phase(moves_on, has_tokens)]
        waits_for = 0

        def observe_last() -> None:
            nonlocal waits_for
            waits_for -= 1
            if not waits_for:
                histogram.observe(self._clock() - cancelled_s)

        waits_for = sum(client.when_let_go(request_id, observe_last) for client in workers)
        if not waits_for:
            histogram.observe(self._clock() - cancelled_s)


def _phase(moves_on: bool | None, has_tokens: bool) -> str:
    """moves_on: None where no worker ever had it."""
    if moves_on is None:
        return "queued"
    if not has_tokens:
        return "prefill"
    return "hand_over" if moves_on else "decode"
