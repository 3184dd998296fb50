"""Steps of a worker that follow each other before the server could be told of the first one, as one step."""

from __future__ import annotations

from trtserve.plugins.api import Output, RequestId, StepOutputs
from trtserve.server.workers import wire

_MOST_JOINED = 64


class PlainSteps:
    """Steps in a row that gave tokens to the same requests and had nothing else to say but their load and pass."""

    def __init__(self, number: int, first_event: int, step: StepOutputs) -> None:
        """number: of the step. `step` has to be plain, see `is_plain`."""
        self._number = number
        self._first_event = first_event
        self._request_ids = _request_ids(step)
        self._last = step
        self._token_ids: list[list[int]] | None = None  # of each request; None while there is one step
        self._count = 1

    def join(self, number: int, step: StepOutputs) -> bool:
        """Take in the plain step that follows; False, and nothing changed, where it is for other requests."""
        if self._count >= _MOST_JOINED or step.rank != self._last.rank or _request_ids(step) != self._request_ids:
            return False
        if self._token_ids is None:
            self._token_ids = [list(output.token_ids) for output in self._last.outputs]
        for token_ids, output in zip(self._token_ids, step.outputs, strict=True):
            token_ids += output.token_ids
        self._number, self._last = number, step
        self._count += 1
        return True

    def message(self) -> wire.Step:
        """With the number, the load and the pass of the last one."""
        last = self._last
        if self._token_ids is not None:
            outputs = [Output(*row) for row in zip(self._request_ids, self._token_ids, strict=True)]
            last = StepOutputs(outputs, last.load, (), last.stats, last.rank)
        return wire.step_of(self._number, self._first_event, last)


def is_plain(step: StepOutputs) -> bool:
    """Whether it gives tokens, says how its pass was, and nothing else."""
    if step.events or step.stats is None or step.stats.prefill_tokens or not step.outputs:
        return False
    return not any(wire.has_detail(output) or not output.token_ids for output in step.outputs)


def _request_ids(step: StepOutputs) -> list[RequestId]:
    return [output.request_id for output in step.outputs]
