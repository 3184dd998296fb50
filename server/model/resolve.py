"""From MODEL, as a user gives it, to a folder on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trtserve.server.model import hub, shipped
from trtserve.server.model.errors import ModelError
from trtserve.server.model.folder import ModelFolder, open_folder
from trtserve.server.model.progress import Progress, silent

DEFAULT_MODEL = shipped.SMOLLM2.name

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(
    name: str, cache_dir: Path | None = None, progress: Progress = silent, verify: bool = False
) -> ModelFolder:
    """The folder behind `name`: a folder's path, a Hugging Face hub id (``owner/name``) or `DEFAULT_MODEL`.

    A folder that exists wins. What is not there yet is fetched, which may take minutes and blocks; two processes at
    once fetch once. cache_dir: where the default model is kept (None: `default_cache_dir`); hub models stay in the
    hub's own cache. verify: hash the default model's files instead of looking at their sizes only.
    Raises ModelError, with what to do, if there is no such model or it cannot be had here.
    """
    path = _expanded(name)
    if path.is_dir():
        return open_folder(path.resolve(), path.resolve().name)
    if path.is_file():
        raise ModelError(f"MODEL {name} is a file; give the folder that holds config.json and tokenizer.json")
    if name == DEFAULT_MODEL:
        return open_folder(shipped.ensure(shipped.SMOLLM2, cache_dir or default_cache_dir(), progress, verify), name)
    if _HUB_ID.fullmatch(name):
        return open_folder(hub.download(name, progress), name)
    raise ModelError(
        f"MODEL {name!r} is no folder here, no hub id (owner/name) and not {DEFAULT_MODEL}; give one of these"
    )


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"MODEL {name!r}: that user has no home folder here; give the whole path") from error


def default_cache_dir() -> Path:
    """``trtserve`` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache). Raises ModelError where there is none."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    if os.path.isabs(root):
        return Path(root) / "trtserve"
    try:
        return Path.home() / ".cache" / "trtserve"
    except RuntimeError as error:  # neither HOME nor an entry in the user database
        raise ModelError(
            "this user has no home folder to keep models in; set TRTSERVE_CACHE_DIR, or give a model's folder"
        ) from error
