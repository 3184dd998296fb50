"""The stand-in for TensorRT-LLM, importable as `tensorrt_llm` during a test and gone afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.models import EOS_TOKEN_ID, make_tiny_model

CONTRACT = Path(__file__).parent


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("contract") / "tiny")


@pytest.fixture
def import_trtllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], ModuleType]]:
    """Imports the stand-in afresh, with the environment as it is then."""

    def load() -> ModuleType:
        _forget()
        import tensorrt_llm

        return tensorrt_llm

    monkeypatch.syspath_prepend(str(CONTRACT))
    yield load
    _forget()


@pytest.fixture
def trtllm(import_trtllm: Callable[[], ModuleType]) -> ModuleType:
    return import_trtllm()


@pytest.fixture
def make_llm(trtllm: ModuleType, model_folder: Path) -> Iterator[Callable[..., Any]]:
    """Makes LLMs that are shut down with the test; blocks of 4 tokens, no tokenizer."""
    with ExitStack() as stack:

        def make(kv: dict[str, Any] | None = None, **arguments: Any) -> Any:
            kv_cache_config = {"tokens_per_block": 4, **(kv or {})}
            return stack.enter_context(
                trtllm.LLM(str(model_folder), skip_tokenizer_init=True, kv_cache_config=kv_cache_config, **arguments)
            )

        yield make


@pytest.fixture
def sampling(trtllm: ModuleType) -> Callable[..., Any]:
    """A new SamplingParams with the ids set."""

    def make(**fields: Any) -> Any:
        return trtllm.SamplingParams(**{"end_id": EOS_TOKEN_ID, "pad_id": EOS_TOKEN_ID, "max_tokens": 8, **fields})

    return make


@pytest.fixture
def violations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the violations' file says so far, one line each without the process."""
    path = tmp_path / "violations.txt"
    monkeypatch.setenv("TENSORRT_LLM_STAND_IN_VIOLATIONS", str(path))
    return lambda: [line.partition(": ")[2] for line in path.read_text().splitlines()] if path.exists() else []
