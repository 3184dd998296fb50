"""Hands the descriptors of a worker's memory to its peers, over a Unix socket in the deployment's private folder.

Whoever connects is sent one packet: the greeting, and with it (SCM_RIGHTS) the descriptors of all segments, in order.
Nothing is read from a peer, so none can hold the thread up. Both ends ask the kernel who the other one is.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Thread

from trtserve.plugins.transfer_api import TransferConfig, TransferError

GREETING = b"trtserve-shm-1"
MAX_SEGMENTS = 128  # the kernel passes up to 253 descriptors at once
SEND_TIMEOUT_S = 1.0
STALE_AFTER_S = 60.0
"""A socket younger than this may be one that is bound and does not listen yet."""

_PAUSE_S = 0.1

_MAX_PATH_BYTES = 107  # sun_path of Linux, less its zero byte


@dataclass(frozen=True, slots=True)
class Credentials:
    """Whom the kernel says is at the other end of a Unix socket; the pid is 0 if it lives in another namespace."""

    pid: int
    uid: int


class DescriptorServer:
    """Serves from `start` to `close`, on a thread of its own. Append to `descriptors` at any time."""

    def __init__(self, config: TransferConfig) -> None:
        self.descriptors: list[int] = []
        who = sha256(f"{config.worker_id}\0{config.incarnation}".encode()).hexdigest()
        self.name = f"shm-{who[:16]}.sock"
        self._path = socket_path(config.runtime_dir, self.name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._is_closing = False
        self._thread = Thread(target=self._serve, name="shm-handout", daemon=True)

    def start(self) -> None:
        """Raises TransferError where the folder is not usable or this incarnation serves already."""
        sweep(Path(self._path).parent)
        try:
            self._socket.bind(self._path)
            os.chmod(self._path, 0o600)
            self._socket.listen(64)
        except OSError as error:
            self._socket.close()
            raise TransferError(f"cannot open the socket {self._path}: {error}") from error
        self._thread.start()

    def close(self) -> None:
        """Stop serving and remove the socket; takes as long as a peer that is being served."""
        self._is_closing = True
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread out of accept
        self._thread.join(2 * SEND_TIMEOUT_S)
        self._socket.close()
        Path(self._path).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._is_closing:
                    return
                time.sleep(_PAUSE_S)  # no descriptor is free, say: peers try again, and so does this
                continue
            with connection:
                self._hand_out(connection)

    def _hand_out(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_TIMEOUT_S)
        try:
            if credentials(connection).uid == os.getuid():
                socket.send_fds(connection, [GREETING], list(self.descriptors))
        except OSError:
            pass  # the peer has gone or has no descriptor free, and will say so itself


def sweep(folder: Path) -> None:
    """Remove the sockets of workers that were killed: nobody listens there any more. Never raises."""
    for path in folder.glob("shm-*.sock"):
        try:
            status = path.lstat()
            is_old = time.time() - status.st_mtime > STALE_AFTER_S
            if is_old and stat.S_ISSOCK(status.st_mode) and _is_abandoned(path):
                path.unlink(missing_ok=True)
        except OSError:
            continue  # another user's, or another worker was faster


def _is_abandoned(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def receive_descriptors(runtime_dir: str, name: str, pid: int, timeout_s: float) -> list[int]:
    """The descriptors that the worker `pid` hands out; the caller closes them. pid 0: any process of this user.

    Raises TransferError.
    """
    path = socket_path(runtime_dir, name)
    until_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.settimeout(max(timeout_s, 1e-3))
            connection.connect(path)
            _check_peer(credentials(connection), pid)
            connection.settimeout(max(until_s - time.monotonic(), 1e-3))
            greeting, descriptors, flags, _ = socket.recv_fds(
                connection, len(GREETING) + 1, MAX_SEGMENTS, socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise TransferError(f"the peer's socket {path} gave no memory: {error or type(error).__name__}") from error
    if greeting != GREETING or flags & socket.MSG_CTRUNC:
        close_all(descriptors)
        raise TransferError(f"the peer's socket {path} gave no memory: is this process out of descriptors?")
    return descriptors


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that are owned here."""
    for descriptor in descriptors:
        os.close(descriptor)


def credentials(connection: socket.socket) -> Credentials:
    """Who is at the other end (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Credentials(pid, uid)


def socket_path(runtime_dir: str, name: str) -> str:
    """Where a worker's socket is. `name` may come from a peer. Raises TransferError."""
    if not name or "/" in name or "\0" in name:
        raise TransferError(f"{name!r} is no name of a socket")
    path = os.path.join(runtime_dir, name)
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise TransferError(f"{path} is longer than a socket's path may be ({_MAX_PATH_BYTES}); use a shorter folder")
    return path


def _check_peer(found: Credentials, pid: int) -> None:
    if found.uid != os.getuid():
        raise TransferError(f"the peer's socket belongs to user {found.uid}, this process to user {os.getuid()}")
    if pid and found.pid != pid:
        raise TransferError(f"the peer's socket belongs to process {found.pid}, not to {pid}; has it been restarted?")
