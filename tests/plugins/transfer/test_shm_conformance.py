"""The shm transfer keeps the contract of transfers."""

import pytest

from trtserve.plugins.conformance.transfer import *  # noqa: F403
from trtserve.plugins.conformance.transfer import TransferCase


@pytest.fixture
def transfer_under_test() -> TransferCase:
    return TransferCase(plugin="trtserve.plugins.transfer.shm", name="shm")
