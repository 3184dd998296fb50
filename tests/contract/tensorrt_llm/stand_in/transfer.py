"""KV between processes: a prefill's side keeps what a prompt's KV would be readable over TCP, a decode's side pulls it.

The address, the request's id and the KV's layout are the opaque state. A pull says which prompt it wants; the prefill's
side answers `ok` once, and frees the blocks. Nothing else frees them but the time limit.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .violations import record

MAGIC = b"\x93TRTLLM-KV\x00"
PULL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What must be alike on both sides."""

    backend: str
    dtype: str
    tokens_per_block: int
    draft_tokens: int

    def difference(self, other: KVLayout) -> str | None:
        for name in ("backend", "dtype", "tokens_per_block", "draft_tokens"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {getattr(self, name)!r} here and {getattr(other, name)!r} on the context side"
        return None


@dataclass(slots=True)
class HeldKV:
    """The KV of one prefilled prompt."""

    prompt_digest: int
    num_tokens: int
    deadline: float | None
    pulling: bool = False


def opaque_state(port: int, incarnation: str, request_id: int, layout: KVLayout) -> bytes:
    fields = {"port": port, "incarnation": incarnation, "request_id": request_id}
    layout_fields = {name: getattr(layout, name) for name in KVLayout.__slots__}
    return MAGIC + json.dumps({**fields, "layout": layout_fields}).encode()


def read_opaque_state(state: bytes) -> tuple[int, str, int, KVLayout]:
    """Port, incarnation, request id and layout. ValueError where the bytes are not what a context request gave."""
    if not state.startswith(MAGIC):
        raise ValueError("opaque_state is not the bytes that the context request gave")
    fields = json.loads(state[len(MAGIC) :])
    return fields["port"], fields["incarnation"], fields["request_id"], KVLayout(**fields["layout"])


class KVSource:
    """What a prefill's side holds. `freed` is called, on any thread, with each id whose KV is gone."""

    def __init__(self, transfer_s: float, freed: Callable[[int], None]) -> None:
        self.incarnation = f"{os.getpid()}-{time.monotonic_ns()}"
        self._transfer_s = transfer_s
        self._freed = freed
        self._held: dict[int, HeldKV] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._answer)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="stand-in-kv").start()

    def hold(self, request_id: int, held: HeldKV) -> None:
        with self._lock:
            self._held[request_id] = held

    def holds(self, request_id: int) -> bool:
        """Whether the request's transfer is in flight: begun or still to come."""
        with self._lock:
            return request_id in self._held

    def free_expired(self, now: float) -> list[int]:
        """Give up what nobody pulled in time; the ids."""
        with self._lock:
            late = [
                id for id, kv in self._held.items() if kv.deadline is not None and kv.deadline < now and not kv.pulling
            ]
            for request_id in late:
                del self._held[request_id]
        return late

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, pull: dict[str, Any]) -> str:
        request_id = pull["request_id"]
        with self._lock:
            held = self._held.get(request_id)
            if pull["incarnation"] != self.incarnation or held is None or held.pulling:
                return "there is no such KV here: pulled already, given up, or of an earlier process"
            if (held.prompt_digest, held.num_tokens) != (pull["digest"], pull["num_tokens"]):
                record(f"request {request_id}: decode was given another prompt than prefill")
                return "the KV is of another prompt"
            held.pulling = True
        time.sleep(self._transfer_s)
        with self._lock:
            self._held.pop(request_id, None)
        self._freed(request_id)
        return "ok"


def pull(port: int, wanted: dict[str, Any]) -> str:
    """Pull one prompt's KV; "ok" or what was wrong. Takes as long as the transfer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PULL_TIMEOUT_S) as connection:
            connection.sendall(json.dumps(wanted).encode() + b"\n")
            return connection.makefile("rb").readline().decode().strip() or "the context side closed the connection"
    except OSError as error:
        return f"the context side cannot be reached: {error}"


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], answer: Callable[[dict[str, Any]], str]) -> None:
        self.answer = answer
        super().__init__(address, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.wfile.write(self.server.answer(json.loads(self.rfile.readline())).encode() + b"\n")
