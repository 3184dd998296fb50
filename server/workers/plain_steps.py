"""Steps of a worker that follow each other before the server could be told of the first one, as one step."""

from __future__ import annotations

from array import array

from msgspec.structs import replace

from trtserve.server.workers import wire

_MOST_JOINED = 64


class PlainSteps:
    """Steps in a row that gave a token each to the same requests and told of their load and pass, and nothing else."""

    def __init__(self, step: wire.Step) -> None:
        """`step` has to be plain, see `is_plain`."""
        self._steps = [step]

    def join(self, step: wire.Step) -> bool:
        """Take in the plain step that follows; False, and nothing changed, where it is for other requests."""
        steps, last = self._steps, self._steps[-1]
        if len(steps) >= _MOST_JOINED or step.rank != last.rank or step.request_ids != last.request_ids:
            return False
        steps.append(step)
        return True

    def message(self) -> wire.Step:
        """With the number, the load and the pass of the last one."""
        steps, last = self._steps, self._steps[-1]
        count = len(steps)
        if count == 1:
            return last
        token_ids = array("i", bytes(count * len(last.token_ids)))
        for place, step in enumerate(steps):
            token_ids[place::count] = wire.token_ids_of(step.token_ids)  # a row's tokens follow each other
        counts = array("H", [count]) * last.num_rows
        return replace(last, counts=counts.tobytes(), token_ids=token_ids.tobytes())


def is_plain(step: wire.Step) -> bool:
    """Whether it gives a token to each of its requests, says how its pass was, and nothing else."""
    if step.details or step.events or step.counts or not step.request_ids:
        return False
    return step.stats is not None and not step.stats.prefill_tokens
