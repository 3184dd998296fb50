"""Keeps the worker processes alive: starts them, watches their health, restarts them with growing pauses, ends them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtserve.plugins.api import Launcher, LaunchSpec, WorkerId, WorkerProcess
from trtserve.server.workers import wire
from trtserve.server.workers.client import WorkerClient, WorkerState
from trtserve.server.workers.pool import WorkerPool
from trtserve.server.workers.worker import EXIT_REFUSED

logger = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 0.5
_LAST_WORDS_S = 1.0  # a connection outlives its process where another one inherited it
_LAST_WORDS_POLL_S = 0.005
_LAST_LINES = 20


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """Seconds. `stop_s`: how long a worker may take to end by itself before it is killed. `forget_s`: how long one that
    was started by hand and is gone is still told of."""

    start_s: float = 600.0
    silence_s: float = 10.0
    stall_s: float = 120.0
    stop_s: float = 5.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    forget_s: float = 3600.0


class WorkerStartFailed(Exception):
    """A worker ended before it was ready for the first time, or was refused: starting it again would not help."""

    def __init__(self, worker_id: WorkerId, reason: str, lines: list[str]) -> None:
        self.worker_id = worker_id
        self.lines = lines
        super().__init__(f"worker {worker_id} did not start: {reason}")


class Supervisor:
    """One task per worker slot inside `run`, and one for all workers started by hand; cancelling `run` ends every
    process of ours before it returns.

    A worker that was never ready and ends is a configuration error: `run` raises WorkerStartFailed with its last
    lines. One that was ready once is started again for ever, with pauses that double up to the longest.
    """

    def __init__(
        self,
        launcher: Launcher,
        pool: WorkerPool,
        make_spec: Callable[[WorkerClient], LaunchSpec],
        limits: SupervisorLimits,
    ) -> None:
        self._launcher = launcher
        self._pool = pool
        self._make_spec = make_spec
        self._limits = limits
        self.processes: dict[WorkerId, WorkerProcess] = {}

    async def run(self, clients: Sequence[WorkerClient]) -> None:
        """Keep a process for each of these workers until cancelled, which ends all of them. Errors come in a group."""
        async with asyncio.TaskGroup() as group:
            ours = frozenset(client.worker_id for client in clients)
            group.create_task(self._watch_guests(ours), name="watch-guests")
            for client in clients:
                group.create_task(self._keep(client), name=f"keep-{client.worker_id}")

    async def _keep(self, client: WorkerClient) -> None:
        pause_s = self._limits.first_pause_s
        was_ready = False
        while True:
            started_s = time.monotonic()
            spec = self._make_spec(client)
            exit_code, reason = await self._one_life(client, spec)
            was_ready = was_ready or client.info is not None
            if not was_ready or exit_code == EXIT_REFUSED:
                raise WorkerStartFailed(client.worker_id, reason, last_lines(spec.log_path))
            logger.error("%s: %s; restarting in %.1f s", client.worker_id, reason, pause_s)
            if time.monotonic() - started_s > self._limits.longest_pause_s:
                pause_s = self._limits.first_pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._limits.longest_pause_s)
            client.restarts += 1

    async def _one_life(self, client: WorkerClient, spec: LaunchSpec) -> tuple[int, str]:
        """Start a process and stay until it has ended. Returns its exit code and what happened, in words."""
        client.state = WorkerState.STARTING
        client.phase = "starting"
        try:
            _keep_old_log(spec.log_path)
            process = await self._launcher.start(spec)
        except OSError as error:
            return -1, f"could not be started: {error}"
        self.processes[client.worker_id] = process
        exited = asyncio.ensure_future(process.wait())
        reason = "stopped"
        try:
            reason = await self._watch(client, exited)
        finally:
            self._pool.gone(client, client.phase if client.state is WorkerState.GONE else reason)
            await _shielded(self._end(process, exited))
            del self.processes[client.worker_id]
        # A worker that said why it failed said it better than its exit code does.
        return exited.result(), client.phase

    async def _watch(self, client: WorkerClient, exited: asyncio.Future[int]) -> str:
        looks = _Looks()
        start_deadline_s = time.monotonic() + self._limits.start_s
        while True:
            await asyncio.wait({exited}, timeout=_CHECK_INTERVAL_S)
            if exited.done():
                await _last_words(client)
                return describe_exit(exited.result())
            now_s = time.monotonic()
            client.excuse(looks.late_s(now_s), now_s)
            if client.state is WorkerState.STARTING and now_s > start_deadline_s:
                return f"not ready after {self._limits.start_s:.0f} s (last phase: {client.phase})"
            if client.state is WorkerState.GONE:
                # It said that it failed; its process has a moment to end by itself.
                await asyncio.wait({exited}, timeout=self._limits.stop_s)
                return client.phase
            trouble = client.trouble(now_s, self._limits.silence_s, self._limits.stall_s)
            if trouble is not None:
                return trouble

    async def _watch_guests(self, ours: frozenset[WorkerId]) -> None:
        """Workers started by hand have no process here: that they fall silent is all there is to see."""
        looks = _Looks()
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            now_s = time.monotonic()
            late_s = looks.late_s(now_s)
            for client in [client for client in self._pool if client.worker_id not in ours]:
                client.excuse(late_s, now_s)
                self._look_at_guest(client, now_s)

    def _look_at_guest(self, client: WorkerClient, now_s: float) -> None:
        limits, silence_s = self._limits, now_s - client.last_heard_s
        if client.state is WorkerState.GONE and silence_s > limits.forget_s:
            self._pool.forget(client)  # they may come with new ids for ever
            return
        trouble = client.trouble(now_s, limits.silence_s, limits.stall_s)
        if client.state is WorkerState.STARTING and silence_s > limits.start_s:
            trouble = f"not heard of for {silence_s:.0f} s (last phase: {client.phase})"
        if trouble is not None:
            logger.error("%s: %s", client.worker_id, trouble)
            self._pool.gone(client, trouble)

    async def _end(self, process: WorkerProcess, exited: asyncio.Future[int]) -> None:
        """Make sure that nothing of the process's group is left."""
        if not exited.done():
            process.signal(signal.SIGTERM)
            await asyncio.wait({exited}, timeout=self._limits.stop_s)
        process.signal(signal.SIGKILL)
        await exited

    def shutdown(self) -> None:
        """Ask every worker to end; cancel `run` afterwards."""
        for client in self._pool:
            client.send(wire.Shutdown())


class _Looks:
    """How late a look at a worker's health comes. Of a server that was stopped, or got no processor, for longer than a
    worker may be silent, all workers would seem to be silent: what they said meanwhile has not been read yet."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()

    def late_s(self, now_s: float) -> float:
        """Call with each look."""
        late_s = now_s - self._last_s - _CHECK_INTERVAL_S
        self._last_s = now_s
        return max(0.0, late_s)


async def _last_words(client: WorkerClient) -> None:
    """Read all that a process said before it ended, which may not be here yet: until its connection is closed."""
    deadline_s = time.monotonic() + _LAST_WORDS_S
    while client.state is not WorkerState.GONE and time.monotonic() < deadline_s:
        # A closed connection takes no message, and whatever sends one sees to it that what has come is read.
        if not client.send(wire.Shutdown()):
            await asyncio.sleep(0)
            return
        await asyncio.sleep(_LAST_WORDS_POLL_S)


async def _shielded(work: object) -> None:
    """Await to the end although this task is being cancelled; `work` is bounded in time by itself."""
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def describe_exit(code: int) -> str:
    """An exit code as `WorkerProcess.wait` gives it, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def last_lines(log_path: str, count: int = _LAST_LINES) -> list[str]:
    """The end of a worker's log; reads at most 64 KiB."""
    try:
        with open(log_path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 65536))
            return list(deque(log.read().decode(errors="replace").splitlines(), count))
    except OSError:
        return []


def _keep_old_log(log_path: str) -> None:
    """One earlier life's log is kept beside the present one's."""
    path = Path(log_path)
    if path.exists():
        path.replace(path.with_suffix(".previous.log"))
