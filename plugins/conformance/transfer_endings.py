"""Conformance of a transfer: how reads, peers and the transfer itself end. Run through
`trtserve.plugins.conformance.transfer`."""

from __future__ import annotations

import os

from trtserve.plugins.conformance.transfer_case import (
    BULK,
    Copies,
    Deployment,
    Imported,
    SiteProcess,
    TransferCase,
)
from trtserve.plugins.transfer_api import Cancelled, TransferOutcome

NUM_BLOCKS = BULK[0].num_blocks
ALL: Copies = {"bulk": (range(NUM_BLOCKS)[::-1], range(NUM_BLOCKS))}
SMALL: Copies = {"keys": ([1, 9], [3, 4]), "scales": (range(20), range(50, 70))}


def test_cancel_right_after_the_beginning(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        peer, third = reader.import_site(source), reader.import_site(other)
        begun = reader.begin(peer, ALL, then="cancel")
        assert Cancelled(begun["cancelled"])
        assert reader.ended(begun["id"]).outcome in (TransferOutcome.CANCELLED, TransferOutcome.DONE)
        _check_targets_are_free(reader, third)
        assert reader.call("cancel", begun["id"]) == Cancelled.STOPPED
        assert reader.call("count", begun["id"]) == 1


def test_cancel_after_the_end(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        transfer_id = reader.begin(peer, SMALL)["id"]
        assert reader.ended(transfer_id).outcome is TransferOutcome.DONE
        assert reader.call("cancel", transfer_id) == Cancelled.STOPPED
        again: Copies = {"keys": ([7], [8])}
        assert reader.read(peer, again).outcome is TransferOutcome.DONE
        assert reader.call("count", transfer_id) == 1
        reader.check((peer, SMALL), (peer, again))


def test_a_deadline_that_has_passed(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        peer, third = reader.import_site(source), reader.import_site(other)
        transfer_id = reader.begin(peer, ALL, deadline_s=1e-6)["id"]
        ended = reader.ended(transfer_id)
        assert ended.outcome is TransferOutcome.TIMED_OUT
        assert ended.num_bytes < NUM_BLOCKS * BULK[0].block_bytes
        _check_targets_are_free(reader, third)
        assert reader.call("count", transfer_id) == 1


def test_drop_peer_during_a_read(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        peer, third = reader.import_site(source), reader.import_site(other)
        transfer_id = reader.begin(peer, ALL, then="drop")["id"]
        reader.call("drop", peer.number)
        assert reader.ended(transfer_id).outcome in (TransferOutcome.PEER_LOST, TransferOutcome.DONE)
        _check_targets_are_free(reader, third)
        assert reader.call("count", transfer_id) == 1


def test_a_dropped_peer_can_be_imported_again(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        for _ in range(3):
            peer = reader.import_site(source)
            assert reader.read(peer, SMALL).outcome is TransferOutcome.DONE
            reader.call("drop", peer.number)
        reader.check((peer, SMALL))


def test_close_during_a_read(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        transfer_id = reader.begin(reader.import_site(source), ALL, then="close")["id"]
        assert reader.call("wait", transfer_id, 0.0) is None
        peer = other.import_site(source)  # which took no harm
        assert other.read(peer, ALL).outcome is TransferOutcome.DONE
        other.check((peer, ALL))


def test_nothing_is_left(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.process(), deployment.process()
        for incarnation in (1, 2, 3, 4):
            if incarnation == 3:  # libraries may keep what their first use has made
                reader.call("remember")
                source.call("remember")
            _live_and_close(deployment, reader, source, incarnation)
        assert reader.call("left_over") == {}
        assert source.call("left_over") == {}
        assert os.listdir(deployment.runtime_dir) == []


def _live_and_close(deployment: Deployment, reader: SiteProcess, source: SiteProcess, incarnation: int) -> None:
    """A life of both with all that opens something: a read, a cancelled one, a drop, a peer that is not dropped."""
    deployment.open(reader, "reader", incarnation=incarnation)
    deployment.open(source, "source", incarnation=incarnation)
    peer = reader.import_site(source)
    assert reader.read(peer, SMALL).outcome is TransferOutcome.DONE
    reader.ended(reader.begin(peer, SMALL, then="cancel")["id"])
    reader.call("map", peer.number, "keys", [1, 2])
    reader.call("drop", peer.number)
    reader.import_site(source)
    source.import_site(reader)
    reader.call("close")
    source.call("close")


def _check_targets_are_free(reader: SiteProcess, third: Imported) -> None:
    """Nothing of an ended read writes any more: what is read from a third worker then stays."""
    plan: Copies = {"bulk": (range(NUM_BLOCKS), range(NUM_BLOCKS))}
    assert reader.read(third, plan).outcome is TransferOutcome.DONE
    reader.check((third, plan))
