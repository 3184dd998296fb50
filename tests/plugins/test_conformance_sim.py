"""The simulated engine passes the suite that it helps others to pass."""

import pytest

from trtserve.plugins.api import EngineConfig
from trtserve.plugins.conformance.engine import *  # noqa: F403
from trtserve.plugins.conformance.engine import EngineCase
from trtserve.plugins.conformance.engine_kv import *  # noqa: F403
from trtserve.plugins.conformance.engine_kv import KVEngineCase
from trtserve.plugins.engines.sim import make_engine


def make(config: EngineConfig):
    return make_engine("sim", config)


@pytest.fixture(params=["plain", "speculating", "ending"])
def engine_under_test(request: pytest.FixtureRequest) -> EngineCase:
    options = {
        "plain": {},
        "speculating": {"num_draft_tokens": 3, "acceptance_rate": 0.6},
        "ending": {"eos_probability": 0.2},
    }[request.param]
    config = EngineConfig(
        model_path="",
        block_size=8,
        num_blocks=400,
        max_num_seqs=6,
        max_num_tokens=64,
        options={"speedup": 1e9, "vocab_size": 1000, **options},
    )
    return EngineCase(make, config, vocab_size=1000, eos_token_ids=(2, 900))


@pytest.fixture
def kv_engine_under_test(engine_under_test: EngineCase) -> KVEngineCase:
    return KVEngineCase(engine_under_test)
