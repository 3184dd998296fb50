"""The UCX transfer over TCP, the lane between nodes, where the peer has to take part in every read.

The suite's reader that dies is left out: UCX may then abort the process that it read from (see `Endpoint`).
"""

import pytest

from trtserve.plugins.conformance.transfer_case import Copies, SiteRaised, TransferCase
from trtserve.plugins.conformance.transfer_deaths import (
    test_a_peer_that_dies_during_the_read,
    test_the_import_of_a_stopped_peer_ends_in_time,
)
from trtserve.plugins.conformance.transfer_reads import (
    test_all_blocks_of_several_regions_in_any_order,
    test_two_workers_read_each_other_at_once,
)
from trtserve.plugins.transfer import ucx
from trtserve.plugins.transfer_api import TransferOutcome

pytestmark = pytest.mark.skipif(ucx.missing("transfer", "ucx") is not None, reason="no libucp")

__all__ = [
    "test_a_peer_that_dies_during_the_read",
    "test_all_blocks_of_several_regions_in_any_order",
    "test_the_import_of_a_stopped_peer_ends_in_time",
    "test_two_workers_read_each_other_at_once",
]

PLAN: Copies = {"keys": (range(5, 25), range(20))}
OF_ITS_OWN: Copies = {"keys": (range(30, 50), range(20))}  # blocks that PLAN does not write
OTHER: Copies = {"keys": ([1, 2], [60, 61])}


@pytest.fixture
def transfer_under_test():
    return TransferCase("trtserve.plugins.transfer.ucx", "ucx", environment={"UCX_TLS": "tcp"})


def test_the_lane_is_the_users_choice(transfer_under_test):
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        assert reader.import_site(source).lane == "tcp"


def test_a_stopped_peer_ends_at_the_deadline_and_writes_nothing_later(transfer_under_test):
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        with source.stopped():
            transfer_id = reader.begin(peer, PLAN, deadline_s=0.3)["id"]
            also = reader.begin(peer, OTHER)["id"]  # of the same peer, with time left
            assert reader.ended(transfer_id).outcome is TransferOutcome.TIMED_OUT
            assert reader.ended(also).outcome is TransferOutcome.PEER_LOST
        # What the peer had been asked for before is answered now, into a closed connection.
        assert reader.read(peer, PLAN).outcome is TransferOutcome.PEER_LOST
        again = reader.import_site(source)
        assert reader.read(again, OTHER).outcome is TransferOutcome.DONE
        reader.check((again, OTHER))


def test_cancel_of_a_read_from_a_stopped_peer_drains_until_the_deadline(transfer_under_test):
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        with source.stopped():
            begun = reader.begin(peer, PLAN, deadline_s=0.3, then="cancel")
            assert begun["cancelled"] == "draining"
            assert reader.ended(begun["id"]).outcome is TransferOutcome.CANCELLED
        again = reader.import_site(source)
        assert reader.read(again, OTHER).outcome is TransferOutcome.DONE
        reader.check((again, OTHER))


def test_a_cancelled_read_leaves_the_others_alone(transfer_under_test):
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        cancelled = reader.begin(peer, PLAN, then="cancel")["id"]
        assert reader.ended(cancelled).outcome is TransferOutcome.CANCELLED
        assert reader.read(peer, PLAN).outcome is TransferOutcome.DONE
        reader.check((peer, PLAN))


def imported(reader, source, attempts=3):
    """The first contact finds the half-open connection and breaks it; workers try again as well."""
    for attempt in range(attempts):
        try:
            return reader.import_site(source)
        except SiteRaised:
            if attempt + 1 == attempts:
                raise
    raise AssertionError("no attempt was made")


def test_a_worker_is_read_again_after_it_dropped_its_reader(transfer_under_test):
    # The drop resets a connection that UCX would take up again.
    with transfer_under_test.deployment() as deployment:
        one, other = deployment.sites("one", "other")
        for _ in range(3):
            peer = one.import_site(other)
            assert one.read(peer, PLAN).outcome is TransferOutcome.DONE
            one.call("drop", peer.number)
        back = imported(other, one)
        assert other.read(back, OF_ITS_OWN).outcome is TransferOutcome.DONE
        other.check((back, OF_ITS_OWN))
