"""What a transfer's author tells the conformance suite, and the worker processes that its tests command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec

from trtserve.plugins.conformance.transfer_site import MAX_MESSAGE_BYTES
from trtserve.plugins.transfer_api import TransferOutcome

Copies = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""Region → (sources, targets)."""


class Layout(NamedTuple):
    """A region to be: block i of it starts at i * stride."""

    name: str
    num_blocks: int
    block_bytes: int
    stride: int


LAYOUTS = (
    Layout("keys", 64, 65536, 65536),
    Layout("states", 40, 12288, 16384),
    Layout("scales", 96, 1000, 1000),
)
OTHER_LAYOUTS = (
    Layout("keys", 48, 65536, 69632),
    Layout("states", 56, 12288, 12288),
    Layout("scales", 80, 1000, 1024),
)
"""Fits LAYOUTS, with other numbers of blocks and other strides."""

BULK = (Layout("bulk", 40, 1 << 20, 1 << 20),)
"""More than one piece, so that something can happen during a read."""


class SiteRaised(Exception):
    """A command raised in a site's process; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Imported:
    """A peer as one site has imported it."""

    number: int
    seed: str  # of the peer's contents
    lane: str
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A read's completion."""

    outcome: TransferOutcome
    num_bytes: int
    duration_s: float
    reason: str


class SiteProcess:
    """One worker process; every command waits for its answer, at most `deadline_s`."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, deadline_s: float) -> None:
        self.process = process
        self.deadline_s = deadline_s
        self.seed = ""
        self._control = control
        control.settimeout(2 * deadline_s)

    def call(self, name: str, *arguments: Any) -> Any:
        """Have a command done. Raises SiteRaised for what it raised; AssertionError if the process died over it."""
        try:
            self._control.send(msgspec.msgpack.encode([name, *arguments]))
            message = self._control.recv(MAX_MESSAGE_BYTES)
        except TimeoutError:
            raise AssertionError(f"{name} did not come back within {2 * self.deadline_s} s") from None
        except ConnectionError:
            message = b""
        assert message, f"the process died over {name} (exit code {self.process.wait(self.deadline_s)})"
        answer = msgspec.msgpack.decode(message)
        if answer[0] == "raised":
            raise SiteRaised(answer[1], answer[2])
        return answer[1]

    def import_site(self, peer: SiteProcess, deadline_s: float | None = None) -> Imported:
        return self.import_export(peer.call("info"), peer.seed, deadline_s)

    def import_export(self, info: Mapping[str, Any], seed: str, deadline_s: float | None = None) -> Imported:
        """Import from what `call("info")` of a peer gave."""
        found = self.call("import_peer", info["info"], info["export"], deadline_s or self.deadline_s)
        return Imported(found["number"], seed, found["lane"], found["bandwidth"])

    def begin(self, peer: Imported, copies: Copies, deadline_s: float | None = None, then: str = "") -> dict[str, Any]:
        """Begin a read; gives its id, and what `cancel` said if that is what comes `then`."""
        rows = [[name, list(sources), list(targets)] for name, (sources, targets) in copies.items()]
        answer: dict[str, Any] = self.call("read", peer.number, rows, deadline_s or self.deadline_s, then)
        return answer

    def ended(self, transfer_id: int) -> Ended:
        """The end of a read, which must come."""
        completion = self.call("wait", transfer_id, self.deadline_s)
        assert completion is not None, f"read {transfer_id} got no completion within {self.deadline_s} s"
        outcome = TransferOutcome(completion["outcome"])
        assert outcome is TransferOutcome.DONE or completion["reason"], "an end that is not DONE says why"
        return Ended(outcome, completion["num_bytes"], completion["duration_s"], completion["reason"])

    def read(self, peer: Imported, copies: Copies, deadline_s: float | None = None) -> Ended:
        """Begin a read and wait for its end."""
        return self.ended(self.begin(peer, copies, deadline_s)["id"])

    def check(self, *read: tuple[Imported, Copies]) -> None:
        """Every byte of this site's regions is as if exactly these reads, in order, had been done."""
        placed: dict[str, dict[int, tuple[str, int]]] = {}
        for peer, copies in read:
            for name, (sources, targets) in copies.items():
                came_from = zip(targets, sources, strict=True)
                placed.setdefault(name, {}).update({target: (peer.seed, source) for target, source in came_from})
        problems = self.call("problems", placed)
        assert not problems, f"{len(problems)} problems: {'; '.join(problems[:5])}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(self.deadline_s)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within, the process does not run (SIGSTOP)."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill the process if it lives."""
        self._control.close()
        self.kill()


@dataclass(frozen=True, slots=True)
class Deployment:
    """Worker processes that share a runtime folder; all end with it."""

    case: TransferCase
    runtime_dir: str
    _ending: ExitStack

    def site(self, worker_id: str, layouts: Sequence[Layout] = LAYOUTS, incarnation: int = 1) -> SiteProcess:
        """Start a worker process and have it open the transfer."""
        site = self.process()
        self.open(site, worker_id, layouts, incarnation)
        return site

    def sites(self, *worker_ids: str, layouts: Sequence[Layout] = LAYOUTS) -> list[SiteProcess]:
        """Several at once, of equal regions."""
        sites = [self.process() for _ in worker_ids]
        for site, worker_id in zip(sites, worker_ids, strict=True):
            self.open(site, worker_id, layouts)
        return sites

    def process(self) -> SiteProcess:
        """A worker process that has opened nothing yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "trtserve.plugins.conformance.transfer_site", str(theirs.fileno())]
        environment = {**os.environ, **self.case.environment}
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        site = SiteProcess(process, ours, self.case.deadline_s)
        self._ending.callback(site.end)
        return site

    def open(
        self, site: SiteProcess, worker_id: str, layouts: Sequence[Layout] = LAYOUTS, incarnation: int = 1
    ) -> None:
        """Have a process open the transfer and register these regions."""
        config = {
            "worker_id": worker_id,
            "incarnation": incarnation,
            "runtime_dir": self.runtime_dir,
            "device": self.case.device,
            "options": dict(self.case.options),
        }
        site.seed = site.call("open", self.case.plugin, self.case.name, config, layouts)


@dataclass(frozen=True, slots=True)
class TransferCase:
    """A transfer to put under test, in processes that the suite starts.

    plugin: the module with the hook `make_transfer`, imported there by this name. name: what the hook is asked for.
    options: as in TransferConfig. environment: added to that of the processes. deadline_s: longer than any import,
    read or answer may take. device: where the regions lie, as in TransferConfig.
    """

    plugin: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    deadline_s: float = 20.0
    device: str = "cpu"

    @contextmanager
    def deployment(self) -> Iterator[Deployment]:
        """Worker processes can be started in it; they are killed at the end."""
        with TemporaryDirectory(prefix="trt-") as runtime_dir, ExitStack() as ending:
            yield Deployment(self, runtime_dir, ending)
