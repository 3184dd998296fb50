"""The file of an ipc:// address. ZeroMQ replaces whatever lies there, a file or another server's socket, and leaves its
own behind; we do neither."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

_CONNECT_S = 1.0


class IpcSocket:
    """The file behind an address, if there is one. In this order: `check`, ZeroMQ binds, `bound`, and `remove` at the
    end."""

    def __init__(self, endpoint: str) -> None:
        scheme, _, path = endpoint.partition("://")
        # "@" is for abstract names, which are no files, and "*" for one of ZeroMQ's own choice.
        self._path = Path(path) if scheme == "ipc" and path[:1] not in ("@", "*") else None
        self._ours: tuple[int, int] | None = None

    def check(self) -> str | None:
        """What is in the way, in words; a socket where nobody listens is not."""
        if self._path is None:
            return None
        try:
            mode = self._path.lstat().st_mode
        except OSError:
            return None  # nothing is there, or ZeroMQ says better why it cannot be
        if not stat.S_ISSOCK(mode):
            return "there is something that is no socket; it is left alone"
        return os.strerror(errno.EADDRINUSE) if _is_listening(self._path) else None

    def bound(self) -> None:
        """The file is ours from here on."""
        if self._path is not None:
            with suppress(OSError):
                self._ours = _identity(self._path)

    def remove(self) -> None:
        """Unless something else lies there by now."""
        if self._path is not None and self._ours is not None:
            with suppress(OSError):
                if _identity(self._path) == self._ours:
                    self._path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    """Numbers of removed files are used again, so the time counts as well."""
    status = path.lstat()
    return status.st_ino, status.st_mtime_ns


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # another user's, or one whose server has stopped and cannot take more
            return True
    return True
