"""Makes a Hugging Face folder from a GGUF file; a process of its own, since it needs numpy and the server must not.

    python -m trtserve.server.model.convert FILE.gguf FOLDER SOURCE

The folder exists and may hold files to keep (a licence). Each line on stdout is ``DONE TOTAL``, in tensors. The
manifest, with SOURCE in it, is written last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trtserve.server.model import llama_files
from trtserve.server.model.gguf_file import read_gguf
from trtserve.server.model.llama_weights import write_weights
from trtserve.server.model.manifest import write_manifest


def convert(gguf: Path, folder: Path, source: str) -> None:
    """Write all files of the folder. Raises ValueError if the GGUF file holds something else than is known here."""
    model = read_gguf(gguf)
    architecture = model.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{gguf.name} has the architecture {architecture}; only llama can be converted")
    has_own_head = any(tensor.name == "output.weight" for tensor in model.tensors)
    _write_json(folder / "config.json", llama_files.model_config(model.metadata, has_own_head))
    _write_json(folder / "generation_config.json", llama_files.generation_config(model.metadata))
    _write_json(folder / "tokenizer.json", llama_files.tokenizer(model.metadata))
    _write_json(folder / "tokenizer_config.json", llama_files.tokenizer_config(model.metadata))
    write_weights(model, folder / "model.safetensors", _report)
    write_manifest(folder, source)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _report(done: int, total: int) -> None:
    print(done, total, flush=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
