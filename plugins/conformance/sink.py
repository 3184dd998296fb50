"""A sink that keeps all that an engine says and lets a test wait for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from threading import Condition

from trtserve.plugins.api import FinishReason, KVEvent, Output, RequestId, StepOutputs


class CollectingSink:
    """An `EngineSink` for tests. Every method may be called by any thread; every wait has a deadline."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._steps: list[StepOutputs] = []
        self._outputs: dict[RequestId, list[Output]] = defaultdict(list)
        self._failures: list[BaseException] = []
        self._phases: list[str] = []

    def push(self, step: StepOutputs) -> None:
        with self._changed:
            self._steps.append(step)
            for output in step.outputs:
                self._outputs[output.request_id].append(output)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failures.append(error)
            self._changed.notify_all()

    def progress(self, phase: str) -> None:
        with self._changed:
            self._phases.append(phase)

    @property
    def steps(self) -> list[StepOutputs]:
        with self._changed:
            return list(self._steps)

    @property
    def events(self) -> list[KVEvent]:
        """All KV events so far, in order."""
        return [event for step in self.steps for event in step.events]

    @property
    def failures(self) -> list[BaseException]:
        with self._changed:
            return list(self._failures)

    @property
    def phases(self) -> list[str]:
        with self._changed:
            return list(self._phases)

    def outputs_of(self, request_id: RequestId) -> list[Output]:
        """What was said of one request so far, in order."""
        with self._changed:
            return list(self._outputs[request_id])

    def wait_ended(self, request_ids: Iterable[RequestId], timeout_s: float) -> None:
        """Wait until each request has a finish reason; AssertionError on failure of the engine or too late."""
        waited_for = list(request_ids)

        def have_ended() -> bool:
            return all(_finish_reasons(self._outputs[request_id]) for request_id in waited_for)

        self._wait(have_ended, timeout_s, f"the end of requests {waited_for}")

    def wait_first_output(self, request_id: RequestId, timeout_s: float) -> None:
        """Wait until anything was said of a request."""
        self._wait(lambda: bool(self._outputs[request_id]), timeout_s, f"an output of request {request_id}")

    def wait_events(self, count: int, timeout_s: float) -> list[KVEvent]:
        """Wait until there are so many KV events; returns all."""

        def events() -> list[KVEvent]:
            return [event for step in self._steps for event in step.events]

        self._wait(lambda: len(events()) >= count, timeout_s, f"{count} KV events")
        with self._changed:
            return events()

    def wait_failure(self, timeout_s: float) -> BaseException:
        """Wait until the engine reported that it is broken; returns why."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: bool(self._failures), timeout_s)
            assert in_time, f"the engine reported no failure within {timeout_s} s"
            return self._failures[0]

    def stays_silent(self, during_s: float) -> bool:
        """Whether no step comes for so long."""
        with self._changed:
            before = len(self._steps)
            return not self._changed.wait_for(lambda: len(self._steps) > before, during_s)

    def _wait(self, is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
        with self._changed:
            in_time = self._changed.wait_for(lambda: bool(self._failures) or is_done(), timeout_s)
            assert not self._failures, f"the engine failed: {self._failures[0]!r}"
            assert in_time, f"waited {timeout_s} s for {what}"


def _finish_reasons(outputs: list[Output]) -> list[FinishReason]:
    return [output.finish_reason for output in outputs if output.finish_reason is not None]
