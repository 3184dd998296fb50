"""Conformance of a transfer: peers that die, hang and come back. Run through
`trtserve.plugins.conformance.transfer`."""

from __future__ import annotations

from trtserve.plugins.conformance.transfer_case import BULK, LAYOUTS, Copies, SiteRaised, TransferCase
from trtserve.plugins.conformance.transfer_refusals import raised_by
from trtserve.plugins.transfer_api import TransferOutcome

NUM_BLOCKS = BULK[0].num_blocks
ALL: Copies = {"bulk": (range(NUM_BLOCKS)[::-1], range(NUM_BLOCKS))}
PLAN: Copies = {"keys": (range(5, 25), range(20)), "scales": ([7, 8], [0, 90])}
DEADLINE_S = 1.0
LATE_S = 2.0  # how long after its deadline a read may end on a busy machine


def test_a_peer_that_died_before_the_read(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other")
        peer, third = reader.import_site(source), reader.import_site(other)
        source.kill()
        for _ in range(2):
            ended = reader.read(peer, PLAN)
            assert ended.outcome in (TransferOutcome.PEER_LOST, TransferOutcome.DONE)
            if ended.outcome is TransferOutcome.DONE:
                reader.check((peer, PLAN))
        assert reader.read(third, PLAN).outcome is TransferOutcome.DONE, "other peers go on"
        reader.call("drop", peer.number)
        reader.check((third, PLAN))


def test_a_peer_that_dies_during_the_read(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        peer, third = reader.import_site(source), reader.import_site(other)
        transfer_id = reader.begin(peer, ALL)["id"]
        source.kill()
        ended = reader.ended(transfer_id)
        assert ended.outcome in (TransferOutcome.PEER_LOST, TransferOutcome.DONE)
        if ended.outcome is TransferOutcome.DONE:
            reader.check((peer, ALL))
        plan: Copies = {"bulk": (range(NUM_BLOCKS), range(NUM_BLOCKS))}
        assert reader.read(third, plan).outcome is TransferOutcome.DONE
        reader.check((third, plan))
        assert reader.call("count", transfer_id) == 1


def test_a_peer_that_dies_after_the_read(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        transfer_id = reader.begin(peer, PLAN)["id"]
        assert reader.ended(transfer_id).outcome is TransferOutcome.DONE
        source.kill()
        reader.check((peer, PLAN))
        reader.call("drop", peer.number)
        assert reader.call("count", transfer_id) == 1


def test_a_reader_that_dies_does_no_harm(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other", layouts=BULK)
        reader.begin(reader.import_site(source), ALL)
        reader.kill()
        peer = other.import_site(source)
        assert other.read(peer, ALL).outcome is TransferOutcome.DONE
        other.check((peer, ALL))
        source.check()


def test_a_stopped_peer_costs_no_more_than_the_deadline(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other")
        peer, third = reader.import_site(source), reader.import_site(other)
        with source.stopped():
            ended = reader.read(peer, PLAN, DEADLINE_S)
            assert ended.outcome in (TransferOutcome.DONE, TransferOutcome.TIMED_OUT)
            assert ended.duration_s < DEADLINE_S + LATE_S
            if ended.outcome is TransferOutcome.DONE:
                reader.check((peer, PLAN))
            assert reader.read(third, PLAN).outcome is TransferOutcome.DONE, "other peers go on"
        reader.call("drop", peer.number)
        reader.check((third, PLAN))


def test_the_import_of_a_stopped_peer_ends_in_time(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        told = source.call("info")
        with source.stopped():
            raised = raised_by(lambda: reader.import_export(told, source.seed, DEADLINE_S))
            assert raised in ("TransferError", "")
        peer = reader.import_site(source)
        assert reader.read(peer, PLAN).outcome is TransferOutcome.DONE
        reader.check((peer, PLAN))


def test_a_dead_peer_cannot_be_imported(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other")
        told = source.call("info")
        source.kill()
        try:
            reader.import_export(told, source.seed, DEADLINE_S)
        except SiteRaised as error:
            assert error.kind == "TransferError"
        else:
            raise AssertionError("a dead peer was imported")
        peer = reader.import_site(other)
        assert reader.read(peer, PLAN).outcome is TransferOutcome.DONE


def test_a_restarted_peer_is_another_one(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        old = reader.import_site(source)
        assert reader.read(old, PLAN).outcome is TransferOutcome.DONE
        source.kill()
        restarted = deployment.site("source", LAYOUTS, incarnation=2)
        new = reader.import_site(restarted)
        plan: Copies = {"keys": (range(40, 60), range(10, 30))}
        assert reader.read(new, plan).outcome is TransferOutcome.DONE
        reader.call("drop", old.number)
        assert reader.read(new, {"scales": ([3], [3])}).outcome is TransferOutcome.DONE
        reader.check((old, PLAN), (new, plan), (new, {"scales": ([3], [3])}))
