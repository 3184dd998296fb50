"""All workers, by id: who may join, and which connection belongs to whom."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from trtserve.plugins.api import EngineInfo, Role, WorkerId
from trtserve.server.workers import wire
from trtserve.server.workers.client import StepListener, WorkerClient, WorkerState
from trtserve.server.workers.kv_messages import KVFetched, KVLinked, KVPublished, KVReleased

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a worker must agree with, so that a mismatch is an error and never a wrong answer."""

    token: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    max_seq_len: int | None = None


class PoolListener(StepListener, Protocol):
    """Who wants to know when capacity comes and goes, and what the workers report (the router)."""

    def worker_connected(self, client: WorkerClient) -> None:
        """A new process said hello: its steps and events count from the beginning, and its cache is empty."""

    def worker_ready(self, client: WorkerClient) -> None:
        """It takes requests now; `client.info` says how many."""

    def worker_gone(self, client: WorkerClient) -> None:
        """One that was ready takes no more requests, and those on it have failed."""

    def worker_relabelled(self, client: WorkerClient, former: Role) -> None:
        """A ready one has the role `client.role` from now on; it is idle."""


class WorkerPool:
    """Checks hellos, routes messages to clients, and tells the listener of workers that come and go."""

    def __init__(self, expectation: Expectation, listener: PoolListener) -> None:
        self._expectation = expectation
        self._listener = listener
        self._clients: dict[WorkerId, WorkerClient] = {}
        self._by_identity: dict[bytes, WorkerClient] = {}
        self._send: Callable[[bytes, wire.ToWorker], bool] = _not_connected
        self._steps: list[tuple[WorkerClient, wire.Step]] = []  # whose tokens are on their way, and no more of them yet

    def attach(self, send: Callable[[bytes, wire.ToWorker], bool]) -> None:
        """The link to answer over."""
        self._send = send

    def add(self, worker_id: WorkerId, role: Role) -> WorkerClient:
        """Expect a worker of that id."""
        client = WorkerClient(worker_id, role, self._listener)
        client.on_unreachable = partial(self.gone, client, "its connection is closed")
        self._clients[worker_id] = client
        return client

    def __iter__(self) -> Iterator[WorkerClient]:
        return iter(self._clients.values())

    def __getitem__(self, worker_id: WorkerId) -> WorkerClient:
        return self._clients[worker_id]

    def gone(self, client: WorkerClient, reason: str) -> None:
        """A worker has ended or is given up. Fails its requests, then tells the listener. Idempotent.

        Its process, should it live on somewhere, is told to end, and nothing that it still sends counts.
        """
        was_ready = client.state is WorkerState.READY
        for identity in [key for key, value in self._by_identity.items() if value is client]:
            del self._by_identity[identity]
            self._send(identity, wire.Shutdown())
        client.gone(reason)
        if was_ready:
            self._listener.worker_gone(client)

    def forget(self, client: WorkerClient) -> None:
        """One that is gone is not told of any more; its id may join again."""
        del self._clients[client.worker_id]

    def relabel(self, client: WorkerClient, role: Role) -> None:
        """Give a ready worker that is idle another role. Its process is not told: roles are labels, and an engine that
        moves KV does both. Its next process is started with the new one."""
        former, client.role = client.role, role
        self._listener.worker_relabelled(client, former)

    # -------------------------------------------------------------- messages

    def on_message(self, identity: bytes, message: wire.FromWorker) -> None:
        """Called by the link for every message, on the loop; `account` when it has read all that was there."""
        client = self._by_identity.get(identity)
        try:
            if client is not None and type(message) is wire.Step:  # nearly all of them
                client.heard()
                client.on_step(message)
                self._steps.append((client, message))
            else:
                self.account()
                self._handle(identity, client, message)
        except Exception as error:
            self._distrust(identity, message, error)

    def _handle(self, identity: bytes, client: WorkerClient | None, message: wire.FromWorker) -> None:
        if isinstance(message, wire.Hello):
            self._hello(identity, message)
            return
        if client is None:
            logger.debug("ignored a message of a former worker %r", identity)
            return
        client.heard()
        match message:
            case wire.Blocks():
                client.on_blocks(message)
            case wire.Heartbeat():
                client.on_heartbeat(message)
            case wire.Progress():
                client.phase = message.phase
                logger.info("%s: %s", client.worker_id, message.phase)
            case wire.Ready():
                self._ready(identity, client, message)
            case KVPublished():
                client.kv.on_published(message)
            case KVReleased():
                client.kv.on_released(message)
            case KVFetched():
                client.kv.on_fetched(message)
            case KVLinked():
                client.kv.links.on_linked(message)
            case wire.Failed():
                self.gone(client, message.reason)

    def account(self) -> None:
        """Tell the listener of the steps whose tokens have been handed on: clients wait for those only."""
        steps, self._steps = self._steps, []
        for client, step in steps:
            try:
                client.account(step)
            except (TypeError, ValueError) as error:
                self._give_up(client, step, error)
            except Exception:
                # No request waits for it, and an index that is wrong costs time only.
                logger.exception("step %d of %s could not be accounted for", step.number, client.worker_id)

    def _distrust(self, identity: bytes, message: wire.FromWorker, error: Exception) -> None:
        """It was handled in part, at most: what is known of that worker and its requests may be wrong by now."""
        client = self._by_identity.get(identity)
        if client is not None:
            self._give_up(client, message, error)
        else:
            logger.error("%s of %r could not be handled", _kind(message), identity, exc_info=error)

    def _give_up(self, client: WorkerClient, message: wire.FromWorker, error: Exception) -> None:
        kind = _kind(message)
        if isinstance(error, (TypeError, ValueError)):  # most likely its packed arrays do not agree with each other
            problem = f"it sent a message ({kind}) that makes no sense: {error}"
        else:
            problem = f"a defect of the server, which could not handle its message ({kind}): {error!r}"
        logger.error("%s: %s", client.worker_id, problem, exc_info=error)
        self.gone(client, problem)

    def _hello(self, identity: bytes, hello: wire.Hello) -> None:
        reason = self._objection(hello)
        if reason is not None:
            # It may be anybody, who says anything.
            logger.error("refused worker %.100r: %.500r", hello.worker_id, reason)
            self._send(identity, wire.Refused(reason))
            return
        client = self._clients.get(hello.worker_id) or self.add(hello.worker_id, hello.role)
        if client in self._by_identity.values():
            self.gone(client, "another process took its place")
        client.state = WorkerState.STARTING
        self._by_identity[identity] = client
        client.connected(partial(self._send, identity), hello.incarnation)
        self._listener.worker_connected(client)
        self._send(identity, wire.Welcome())

    def _objection(self, hello: wire.Hello) -> str | None:
        want = self._expectation
        if hello.wire_version != wire.WIRE_VERSION:
            return (
                f"it speaks wire version {hello.wire_version} (trtserve {hello.trtserve_version}), the server "
                f"{wire.WIRE_VERSION}; install the same trtserve on both"
            )
        if not hmac.compare_digest(hello.token.encode(), want.token.encode()):
            return "its token is not this server's; pass the server's token file"
        if hello.model_fingerprint != want.model_fingerprint:
            return f"it has model {hello.model_fingerprint}, the server {want.model_fingerprint}"
        if hello.tokenizer_fingerprint != want.tokenizer_fingerprint:
            return f"it has tokenizer {hello.tokenizer_fingerprint}, the server {want.tokenizer_fingerprint}"
        client = self._clients.get(hello.worker_id)
        if client is not None and client.role is not hello.role:
            return f"it says --role {hello.role}, but {hello.worker_id} is a {client.role} worker here"
        return None

    def _ready(self, identity: bytes, client: WorkerClient, ready: wire.Ready) -> None:
        reason = self._objection_to_blocks(client, ready)
        if reason is not None:
            logger.error("refused worker %s: %s", client.worker_id, reason)
            self._send(identity, wire.Refused(reason))
            del self._by_identity[identity]  # it ends by itself, with the exit code of a refusal
            self.gone(client, reason)
            return
        info = ready.info
        client.ready(info, ready.kv)
        logger.info(
            "%s: ready, %d KV blocks of %d tokens, %d sequences at once, %d tokens each",
            client.worker_id,
            info.num_blocks,
            info.block_size,
            info.max_num_seqs,
            info.max_seq_len,
        )
        self._listener.worker_ready(client)

    def _objection_to_blocks(self, client: WorkerClient, ready: wire.Ready) -> str | None:
        for other in self._clients.values():
            if other is client or other.info is None:
                continue
            if other.info.block_size != ready.info.block_size:
                return (
                    f"its KV blocks hold {ready.info.block_size} tokens, those of {other.worker_id} "
                    f"{other.info.block_size}; prefix routing needs one size"
                )
            if ready.kv is not None and other.kv.port is not None and ready.kv.layout != other.kv.port.layout:
                return (
                    f"its KV has the layout {ready.kv.layout}, that of {other.worker_id} {other.kv.port.layout}; start "
                    "all workers with one model, dtype, block size and engine, or without disaggregation"
                )
            if (ready.info.moves_kv, ready.info.kv_fingerprint) != (other.info.moves_kv, other.info.kv_fingerprint):
                return (
                    f"{_how_kv_moves(ready.info)}, but of {other.worker_id}, {_how_kv_moves(other.info)}; start all "
                    "workers with one engine and the same options for moving KV"
                )
        return None


def _kind(message: wire.FromWorker) -> str:
    return type(message).__name__.lower()


def _how_kv_moves(info: EngineInfo) -> str:
    return f"its engine moves KV itself, as {info.kv_fingerprint!r}" if info.moves_kv else "its engine moves no KV"


def _not_connected(identity: bytes, message: wire.ToWorker) -> bool:
    return False
