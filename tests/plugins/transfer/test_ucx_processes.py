"""The UCX transfer in processes of its own: lanes, deaths, and that the library gets back what it gave."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtserve.plugins.conformance.transfer_case import Copies, TransferCase
from trtserve.plugins.transfer import ucx
from trtserve.plugins.transfer_api import TransferOutcome

pytestmark = pytest.mark.skipif(ucx.missing("transfer", "ucx") is not None, reason="no libucp")

LANES = {"cma": {}, "tcp": {"UCX_TLS": "tcp"}}
PLAN: Copies = {"keys": (range(5, 25), range(20))}


@pytest.fixture(params=LANES)
def lane(request):
    return request.param


@pytest.fixture
def deployment(lane):
    case = TransferCase("trtserve.plugins.transfer.ucx", "ucx", environment=LANES[lane])
    with case.deployment() as deployment:
        yield deployment


def test_a_dead_peer_is_lost(deployment, lane):
    reader, source = deployment.sites("reader", "source")
    peer = reader.import_site(source)
    assert peer.lane == lane
    source.kill()
    assert reader.read(peer, PLAN).outcome is TransferOutcome.PEER_LOST
    assert reader.read(peer, PLAN).outcome is TransferOutcome.PEER_LOST, "and stays so"
    reader.check()


def test_peers_that_come_and_go_leave_nothing(deployment):
    reader, source = deployment.sites("reader", "source")
    kept = reader.import_site(source)
    for incarnation in (1, 2, 3):
        visitor = deployment.site("visitor", incarnation=incarnation)
        assert visitor.read(visitor.import_site(source), PLAN).outcome is TransferOutcome.DONE
        peer = reader.import_site(visitor)
        visitor.kill()
        assert reader.read(peer, PLAN).outcome is TransferOutcome.PEER_LOST
        assert reader.read(kept, PLAN).outcome is TransferOutcome.DONE
        if incarnation == 1:  # libraries may keep what their first use has made
            reader.call("remember")
            source.call("remember")
    assert reader.call("left_over") == {}
    assert source.call("left_over") == {}


def test_everything_is_given_back(lane):
    script = Path(__file__).with_name("ucx_counts.py")
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, **LANES[lane]}, stdout=subprocess.PIPE, timeout=50, check=True
    )
    counts = json.loads(done.stdout)
    assert counts["taken"]["requests"] > 0
    assert counts["given"] == counts["taken"]
    assert counts["more descriptors"] == 0
