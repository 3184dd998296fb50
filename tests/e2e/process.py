"""A real `trtserve` in a process of its own: started, asked, ended, and checked for processes it left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import httpx

TRTSERVE = Path(sys.executable).with_name("trtserve")
_MARK = "E2E_MARK"
"""An environment variable that every process of a server's tree inherits, by which they are found."""

_POLL_S = 0.03
_Value = TypeVar("_Value")


def eventually(question: Callable[[], _Value], what: str, timeout_s: float = 20.0) -> _Value:
    """The first true answer to `question`; fails after the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not (answer := question()):
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what} (last answer: {answer!r})"
        time.sleep(_POLL_S)
    return answer


class TrtserveProcess:
    """One run of the console script; its output is read all the time. Use as a context manager: leaving ends it."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._mark = uuid.uuid4().hex
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRTSERVE_")}
        self._process = subprocess.Popen(
            self.command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=inherited | {_MARK: self._mark, "PYTHONUNBUFFERED": "1"} | (environment or {}),
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def command(self, arguments: tuple[str, ...]) -> list[str]:
        return [str(TRTSERVE), *arguments]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            self._lines.extend(stdout)

    def __enter__(self) -> TrtserveProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        """End it and whatever is left of it; then complain about what was left."""
        if self.is_running:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGTERM)  # at once
        try:
            self.wait()
            left = self.tree()
        finally:
            for pid in self.tree():
                os.kill(pid, signal.SIGKILL)
        assert not left, f"processes were left behind: {left}"
        # A worker's last lines are shown behind a bar; those may have one.
        assert not re.search("^Traceback", self.output, re.MULTILINE), self.output

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """stdout and stderr so far."""
        return "".join(self._lines)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 25.0) -> int:
        """The exit code; the output is complete then."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s:\n{self.output}") from None
        self._reader.join(timeout_s)
        return code

    def until_output(self, text: str, timeout_s: float = 30.0) -> str:
        """The output, once `text` is in it."""
        eventually(lambda: text in self.output or not self.is_running, f"{text!r} in {self.output}", timeout_s)
        assert text in self.output, self.output
        return self.output

    def tree(self) -> list[int]:
        """The process ids of this run, its own included, that are alive (a zombie is not)."""
        mark = f"{_MARK}={self._mark}".encode()
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _bears(entry, mark)]


def _bears(process: Path, mark: bytes) -> bool:
    try:
        return mark in (process / "environ").read_bytes()
    except OSError:  # ended meanwhile, or another user's
        return False


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:  # ended meanwhile
        return []


class ServerProcess(TrtserveProcess):
    """A `trtserve serve` on a free port."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        super().__init__("serve", "--port", "0", *arguments, environment=environment)
        self.client = httpx.Client(timeout=30.0, trust_env=False)

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        super().__exit__(*exception)

    def until_ready(self) -> ServerProcess:
        """Wait for the banner; its address becomes the client's."""
        self.until_output("curl -N")
        self.client.base_url = httpx.URL(self.url)
        return self

    @property
    def url(self) -> str:
        found = re.search(r"http://[\d.]+:\d+", self.output)
        assert found is not None, self.output
        return found[0]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def worker_pids(self) -> list[int]:
        return [pid for pid in self.tree() if pid != self.pid]

    def worker_pid(self, worker_id: str) -> int:
        """The process of one worker, once there is one."""

        def find() -> int | None:
            return next((pid for pid in self.worker_pids() if worker_id in _arguments(pid)), None)

        return eventually(find, f"the process of {worker_id}")  # type: ignore[return-value]  # true, so no None

    def metrics(self) -> dict[str, float]:
        """Sample → value; a sample is its name with its labels as Prometheus writes them."""
        lines = self.client.get("/metrics").text.splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 where it has no sample yet."""
        return summed(self.metrics(), name)

    def until_metric(self, name: str, is_right: Callable[[float], bool], timeout_s: float = 20.0) -> float:
        """Wait until a metric has a value; returns it."""
        eventually(lambda: is_right(self.metric(name)), name, timeout_s)
        return self.metric(name)

    def until_idle(self, num_blocks: int) -> None:
        """Wait until nothing is booked, queued, running or held any more, in the server and in its workers."""
        zero = (
            *("trtserve_inflight_requests", "trtserve_queued_requests", "trtserve_queued_tokens"),
            *("trtserve_worker_booked_sequences", "trtserve_worker_running_sequences"),
            *("trtserve_worker_waiting_sequences", "trtllm_num_requests_running", "trtllm_num_requests_waiting"),
        )

        def is_idle() -> bool:
            now = self.metrics()
            busy = any(summed(now, name) for name in zero)
            return not busy and summed(now, "trtserve_worker_free_blocks") == num_blocks

        eventually(is_idle, "idle again")


def summed(metrics: dict[str, float], name: str) -> float:
    """One metric over all its labels."""
    return sum(value for sample, value in metrics.items() if sample.partition("{")[0] == name)


Serve = Callable[..., ServerProcess]


def sim_arguments(model: Path, *more: str, num_blocks: int = 64, options: Sequence[str] = ()) -> list[str]:
    """Flags for the simulated engine with a small cache; options: its own, as name=value."""
    flags = [str(model), "--engine", "sim", "--num-blocks", str(num_blocks), *more]
    for option in options:
        flags += ["--engine-option", option]
    return flags
