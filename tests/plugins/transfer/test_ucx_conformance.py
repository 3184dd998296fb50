"""The UCX transfer keeps the contract of transfers, over the lane that it finds within a node."""

import pytest

from trtserve.plugins.conformance.transfer import *  # noqa: F403
from trtserve.plugins.conformance.transfer import TransferCase
from trtserve.plugins.transfer import ucx

pytestmark = pytest.mark.skipif(ucx.missing("transfer", "ucx") is not None, reason="no libucp")


@pytest.fixture
def transfer_under_test():
    return TransferCase(plugin="trtserve.plugins.transfer.ucx", name="ucx")
