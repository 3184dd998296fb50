"""The transfers on GPU memory keep the contract, between processes on one device."""

from __future__ import annotations

import pytest

from trtserve.plugins.conformance.transfer import *  # noqa: F403
from trtserve.plugins.conformance.transfer import TransferCase
from trtserve.plugins.manager import PluginManager

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cupy_ipc", "ucx", "nixl"])
def transfer_under_test(request, device):
    problem = PluginManager().problem("transfer", request.param)
    if problem is not None:
        pytest.skip(problem)
    return TransferCase(f"trtserve.plugins.transfer.{request.param}", request.param, device=device, deadline_s=40.0)
