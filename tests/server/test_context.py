"""How long prompts and sequences may be, from the workers that there are."""

from __future__ import annotations

import pytest

from trtserve.plugins.api import EngineInfo, Role
from trtserve.server.context import ContextLimits, context_limits


def worker(role, max_seq_len, max_prompt_tokens=None):
    return role, EngineInfo(16, 100, 8, 512, max_seq_len, 1000, max_prompt_tokens=max_prompt_tokens)


AGG, PREFILL, DECODE = Role.AGG, Role.PREFILL, Role.DECODE


@pytest.mark.parametrize(
    ("workers", "limits"),
    [
        ([], None),
        ([worker(AGG, 100), worker(AGG, 90)], (90, 89)),
        ([worker(AGG, 100, 40)], (100, 40)),
        ([worker(AGG, 100, 400)], (100, 99)),
        # A prefill worker holds the prompt and one token.
        ([worker(PREFILL, 1227), worker(DECODE, 2251)], (2251, 1226)),
        ([worker(PREFILL, 1227, 1000), worker(DECODE, 2251)], (2251, 1000)),
        ([worker(PREFILL, 3000), worker(DECODE, 2251)], (2251, 2250)),
        # A decode worker computes a prompt only where a hand-over has failed.
        ([worker(PREFILL, 8192), worker(DECODE, 8704, 512)], (8704, 8191)),
        ([worker(PREFILL, 1227)], (1227, 1226)),
        ([worker(DECODE, 2251)], (2251, 2250)),
    ],
)
def test_limits(workers, limits):
    assert context_limits(workers) == (None if limits is None else ContextLimits(*limits))
