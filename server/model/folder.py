"""A Hugging Face model folder, and what the server reads of it: small JSON files, never the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trtserve.plugins.fingerprint import model_fingerprint, tokenizer_fingerprint
from trtserve.server.model.errors import ModelError

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the server needs of config.json. None: the file does not say."""

    max_position_embeddings: int | None
    vocab_size: int | None


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What generation_config.json asks for where a client says nothing. None: it says nothing either."""

    eos_token_ids: tuple[int, ...] = ()  # any of these ends a sequence
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """16 hex digits each; equal on two machines that serve the same model."""

    model: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with config.json and tokenizer.json in it; weights may be missing. Each reader reads its file anew."""

    path: Path
    name: str  # what MODEL was: the alias, the hub id, or the folder's own name

    @property
    def tokenizer_json(self) -> Path:
        return self.path / "tokenizer.json"

    def config(self) -> ModelConfig:
        """config.json; of a multimodal model, the text part. Raises ModelError if it cannot be understood."""
        config = _read_json(self.path / "config.json")
        text = config.get("text_config")
        inner = {**config, **text} if isinstance(text, Mapping) else config
        return ModelConfig(
            max_position_embeddings=self._number(inner, "config.json", "max_position_embeddings", int),
            vocab_size=self._number(inner, "config.json", "vocab_size", int),
        )

    def generation_defaults(self) -> GenerationDefaults:
        """generation_config.json; the ids that end a sequence come from config.json if it has none."""
        name = "generation_config.json"
        generation = _read_json(self.path / name, missing={})
        eos = generation.get("eos_token_id")
        if eos is None:
            config = _read_json(self.path / "config.json")
            text = config.get("text_config")
            eos = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, Mapping) else None)
        sampled = generation.get("do_sample", True) is not False
        return GenerationDefaults(
            eos_token_ids=self._token_ids(eos),
            temperature=self._number(generation, name, "temperature", float) if sampled else None,
            top_p=self._number(generation, name, "top_p", float) if sampled else None,
            top_k=self._number(generation, name, "top_k", int) if sampled else None,
            repetition_penalty=self._number(generation, name, "repetition_penalty", float),
        )

    def tokenizer_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json, or an empty mapping."""
        return _read_json(self.path / "tokenizer_config.json", missing={})

    def chat_template_file(self) -> str | None:
        """The text of chat_template.jinja, or None if there is no such file."""
        path = self.path / "chat_template.jinja"
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

    def fingerprints(self) -> Fingerprints:
        """Raises ModelError if a weights file is cut off."""
        try:
            return Fingerprints(model_fingerprint(self.path), tokenizer_fingerprint(self.path))
        except (OSError, ValueError) as error:
            raise ModelError(str(error)) from error

    def _number(self, config: Mapping[str, Any], file: str, key: str, kind: type[_Number]) -> _Number | None:
        value = config.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
            raise ModelError(f"{key} in {self.path / file} is {value!r}; it must be a number: correct the file")
        return kind(value)

    def _token_ids(self, value: object) -> tuple[int, ...]:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise ModelError(f"eos_token_id in {self.path} is {value!r}; it must be a token id or a list of them")
        return tuple(ids)


def open_folder(path: Path, name: str) -> ModelFolder:
    """Check that the folder can be served. Raises ModelError naming what is missing or cannot be understood."""
    for file, why in (("config.json", "it describes the model"), ("tokenizer.json", "only fast tokenizers are served")):
        if not (path / file).is_file():
            raise ModelError(f"{path} has no {file} ({why}); give a whole Hugging Face model folder as MODEL")
    folder = ModelFolder(path, name)
    # What else is wrong with these would otherwise end a worker first, with a traceback.
    folder.config()
    folder.generation_defaults()
    return folder


def _read_json(path: Path, missing: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    if missing is not None and not path.exists():
        return missing
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
