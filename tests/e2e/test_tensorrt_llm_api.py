"""The OpenAI API over the TensorRT-LLM engine: the tests of the simulated engine, aggregated and disaggregated."""

from __future__ import annotations

import pytest

from tests.e2e.stand_in import StandInServer, stand_in_server
from tests.e2e.test_generation import *  # noqa: F403
from tests.e2e.test_generation import COMPLETIONS, post
from tests.e2e.test_openai_client import test_the_client_finds_nothing_to_complain_of  # noqa: F401


@pytest.fixture(scope="module", params=["agg", "disagg"])
def server(request, sim_model, tmp_path_factory):
    with stand_in_server(sim_model, tmp_path_factory.mktemp(request.param), mode=request.param) as server:
        yield server


@pytest.fixture(autouse=True)
def _leaves_the_server_idle(server: StandInServer):
    yield
    server.until_idle()
    assert server.broken_rules() == []


def test_cached_tokens_on_a_repeat(server):
    """In place of the other engines': TensorRT-LLM uses the filled part of a block again as well."""
    body = {"prompt": "A prompt with more than two blocks of sixteen tokens each in it", "max_tokens": 2}
    first = post(server, COMPLETIONS, body | {"cache_salt": "test"})["usage"]
    again = post(server, COMPLETIONS, body | {"cache_salt": "test"})["usage"]
    other = post(server, COMPLETIONS, body | {"cache_salt": "other"})["usage"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, again, other)]
    assert cached == [0, first["prompt_tokens"] - 1, 0]
