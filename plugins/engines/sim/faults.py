"""Faults on request: what a test of the server around the engine wants to see go wrong, and when."""

from __future__ import annotations

import os
from collections.abc import Callable

from trtserve.plugins.api import Request, RequestId
from trtserve.plugins.engines.sim.options import FaultKind, SimOptions
from trtserve.plugins.engines.sim.scheduler import Scheduler

CRASH_EXIT_CODE = 70


class Faults:
    """Decides before each pass whether something goes wrong in it.

    `hang` is called where the pass shall not end; it returns only when the engine is being closed.
    """

    def __init__(self, options: SimOptions, hang: Callable[[], None]) -> None:
        self._options = options
        self._hang = hang
        self._num_steps = 0
        self._targets: list[RequestId] = []  # live or ended requests whose prompts ask for the fault

    def watch(self, request: Request) -> None:
        """Remember a request that was added if its prompt holds the fault's token."""
        token_id = self._options.fault_token_id
        if token_id is not None and token_id in request.prompt[: len(request.prompt) - request.num_resumed]:
            self._targets.append(request.id)

    def before_pass(self, scheduler: Scheduler) -> None:
        """Let happen what is due."""
        steps, self._num_steps = self._num_steps, self._num_steps + 1
        if self._options.crash_after_steps is not None and steps >= self._options.crash_after_steps:
            os._exit(CRASH_EXIT_CODE)
        if self._options.hang_after_steps is not None and steps >= self._options.hang_after_steps:
            self._hang()
        if self._targets:
            self._targets = [request_id for request_id in self._targets if self._is_spared(request_id, scheduler)]

    def _is_spared(self, request_id: RequestId, scheduler: Scheduler) -> bool:
        """Whether a target has yet to get its fault; lets it happen otherwise."""
        num_generated = scheduler.num_generated(request_id)
        if num_generated is None:
            return False
        if num_generated < self._options.fault_after_tokens:
            return True
        match self._options.fault_kind:
            case FaultKind.CRASH:
                os._exit(CRASH_EXIT_CODE)
            case FaultKind.HANG:
                self._hang()
            case FaultKind.ERROR:
                scheduler.fail(request_id, "The simulated engine failed this request: its prompt holds fault_token_id.")
        return False
