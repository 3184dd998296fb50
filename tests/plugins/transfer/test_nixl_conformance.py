"""The nixl transfer keeps the contract of transfers."""

import pytest

from trtserve.plugins.conformance.transfer import *  # noqa: F403
from trtserve.plugins.conformance.transfer import TransferCase
from trtserve.plugins.transfer import nixl

pytestmark = pytest.mark.skipif(nixl.missing("transfer", "nixl") is not None, reason="no NIXL")


@pytest.fixture
def transfer_under_test() -> TransferCase:
    # UCX's hooks on memory functions, which take each process 0.4 s, are for RDMA and GPUs.
    environment = {"UCX_MEM_MMAP_HOOK_MODE": "none", "OPENBLAS_NUM_THREADS": "1"}
    return TransferCase(plugin="trtserve.plugins.transfer.nixl", name="nixl", environment=environment)
