"""The server's private folder: the workers' socket, their settings, and their logs unless those go elsewhere."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtserve.settings.errors import SettingsError


@contextmanager
def runtime_folder() -> Iterator[Path]:
    """Made in the system's folder for temporary files, which TMPDIR names, open to this user only; removed at the end.

    Raises SettingsError where there is no place for it.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="trtserve-"))  # 0700
    except OSError as error:
        raise SettingsError(f"a folder for the workers' socket cannot be made ({error}); set TMPDIR to one") from error
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Files there may not change for weeks; the lock keeps systemd-tmpfiles from them (tmpfiles.d(5), "Age").
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
