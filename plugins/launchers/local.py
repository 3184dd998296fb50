"""Starts workers as processes of this machine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from trtserve.plugins.api import Launcher, LaunchSpec, WorkerProcess
from trtserve.plugins.hooks import hookimpl


class LocalProcess:
    """A worker process and the group it leads."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        return await self._process.wait()

    def signal(self, signal_number: int) -> None:
        # The group outlives its leader where an engine left ranks behind; a group without members is no error.
        try:
            os.killpg(self._process.pid, signal_number)
        except ProcessLookupError:
            pass
        if signal_number == signal.SIGKILL:
            _kill_session(self._process.pid)


class LocalLauncher:
    """One process, in a group of its own so that a terminal's Ctrl-C reaches the server alone."""

    async def start(self, spec: LaunchSpec) -> WorkerProcess:
        log = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(spec.environment),
                start_new_session=True,
            )
        finally:
            os.close(log)
        return LocalProcess(process)


def _kill_session(session_id: int) -> None:
    """Open MPI 5 gives each rank a process group of its own; they stay in the session."""
    for pid in _members(session_id):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _members(session_id: int) -> Iterator[int]:
    """Pids, zombies included; none where there is no /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except OSError:  # ended meanwhile
            continue
        if int(fields[3]) == session_id:
            yield int(stat.parent.name)


@hookimpl
def make_launcher(name: str) -> Launcher | None:
    return LocalLauncher() if name == "local" else None
