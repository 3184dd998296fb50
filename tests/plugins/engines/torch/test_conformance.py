"""The conformance suite of engines on a tiny model."""

from __future__ import annotations

import pytest

from trtserve.plugins.api import EngineConfig
from trtserve.plugins.conformance.engine import *  # noqa: F403
from trtserve.plugins.conformance.engine import EngineCase
from trtserve.plugins.conformance.engine_kv import *  # noqa: F403
from trtserve.plugins.conformance.engine_kv import KVEngineCase
from trtserve.plugins.driver import Driver
from trtserve.plugins.engines.torch.engine import TorchEngine


@pytest.fixture
def engine_under_test(tiny_llama_folder):
    config = EngineConfig(
        str(tiny_llama_folder),
        dtype="float32",
        device="cpu",
        num_blocks=64,
        max_num_seqs=4,
        max_num_tokens=64,
        options={"num_threads": 1},
    )
    return EngineCase(lambda changed: Driver(TorchEngine(changed)), config, vocab_size=320, eos_token_ids=(2,))


@pytest.fixture
def kv_engine_under_test(engine_under_test):
    return KVEngineCase(engine_under_test)
