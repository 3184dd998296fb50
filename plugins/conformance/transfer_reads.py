"""Conformance of a transfer: what it reads, byte for byte. Run through `trtserve.plugins.conformance.transfer`."""

from __future__ import annotations

import hashlib
from random import Random

from trtserve.plugins.conformance.transfer_case import BULK, LAYOUTS, OTHER_LAYOUTS, Copies, TransferCase
from trtserve.plugins.conformance.transfer_site import block_bytes_of
from trtserve.plugins.transfer_api import TransferOutcome


def test_single_and_adjacent_and_scattered_blocks(transfer_under_test: TransferCase) -> None:
    plans: list[Copies] = [
        {"keys": ([7], [7])},
        {"keys": ([63], [0])},
        {"keys": (range(10, 30), range(20, 40))},  # adjacent on both sides
        {"keys": ([1, 2, 3], [43, 42, 41])},  # on one side
        {"keys": ([5, 5, 9], [50, 51, 52])},  # one source twice
        {"scales": ([95, 0, 40, 41], [0, 95, 3, 4])},
    ]
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        for plan in plans:
            ended = reader.read(peer, plan)
            assert ended.outcome is TransferOutcome.DONE, ended.reason
            assert ended.num_bytes == plan_bytes(plan)
        reader.check(*[(peer, plan) for plan in plans])
        source.check()


def test_all_blocks_of_several_regions_in_any_order(transfer_under_test: TransferCase) -> None:
    plan = shuffled_plan(Random(5))
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        ended = reader.read(peer, plan)
        assert ended.outcome is TransferOutcome.DONE, ended.reason
        assert ended.num_bytes == plan_bytes(plan)
        reader.check((peer, plan))


def test_numbers_of_blocks_and_strides_may_differ(transfer_under_test: TransferCase) -> None:
    there: Copies = {
        "keys": (range(48), range(10, 58)),
        "states": ([55, 54, 0, 1], [0, 1, 2, 3]),
        "scales": ([79], [95]),
    }
    # Blocks that the first read left alone on one side and does not need on the other.
    back: Copies = {"keys": ([63, 62], [0, 1]), "states": (range(4, 40), range(4, 40)), "scales": (range(9), range(9))}
    with transfer_under_test.deployment() as deployment:
        one, other = deployment.site("one"), deployment.site("other", OTHER_LAYOUTS)
        peer = one.import_site(other)
        assert one.read(peer, there).outcome is TransferOutcome.DONE
        one.check((peer, there))
        peer = other.import_site(one)
        assert other.read(peer, back).outcome is TransferOutcome.DONE
        other.check((peer, back))


def test_many_megabytes(transfer_under_test: TransferCase) -> None:
    num_blocks = BULK[0].num_blocks
    adjacent: Copies = {"bulk": (range(num_blocks - 1), range(1, num_blocks))}
    backwards: Copies = {"bulk": (range(num_blocks)[::-1], range(num_blocks))}
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source", layouts=BULK)
        peer = reader.import_site(source)
        for plan in (adjacent, backwards):
            ended = reader.read(peer, plan)
            assert ended.outcome is TransferOutcome.DONE, ended.reason
            reader.check((peer, adjacent), (peer, plan))


def test_two_workers_read_each_other_at_once(transfer_under_test: TransferCase) -> None:
    plan: Copies = {"keys": (range(32), range(32, 64)), "scales": (range(32), range(64, 96))}
    with transfer_under_test.deployment() as deployment:
        one, other = deployment.sites("one", "other")
        peer_of_one, peer_of_other = one.import_site(other), other.import_site(one)
        reads = [one.begin(peer_of_one, plan)["id"], other.begin(peer_of_other, plan)["id"]]
        assert one.ended(reads[0]).outcome is TransferOutcome.DONE
        assert other.ended(reads[1]).outcome is TransferOutcome.DONE
        one.check((peer_of_one, plan))
        other.check((peer_of_other, plan))


def test_many_reads_of_two_peers_at_once(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, first, second = deployment.sites("reader", "first", "second")
        peers = [reader.import_site(first), reader.import_site(second)]
        plans: list[Copies] = [{"keys": ([63 - block], [block]), "scales": ([block], [block])} for block in range(64)]
        reads = [(peers[number % 2], plan) for number, plan in enumerate(plans)]
        ids = [reader.begin(peer, plan)["id"] for peer, plan in reads]
        assert len(set(ids)) == len(ids), "an id is never used again"
        assert all(reader.ended(transfer_id).outcome is TransferOutcome.DONE for transfer_id in reversed(ids))
        assert all(reader.call("count", transfer_id) == 1 for transfer_id in ids)
        reader.check(*reads)


def test_an_empty_plan_is_done(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        plans: list[Copies] = [{}, {"keys": ([], [])}]
        for plan in plans:
            ended = reader.read(peer, plan)
            assert (ended.outcome, ended.num_bytes) == (TransferOutcome.DONE, 0)
        reader.check()


def test_mapped_blocks_are_the_peers_bytes(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.site("reader"), deployment.site("source", OTHER_LAYOUTS)
        mapped = reader.call("map", reader.import_site(source).number, "scales", [0, 79, 5])
        if not reader.call("caps")["maps_blocks"]:
            assert mapped is None
            return
        blocks = [block_bytes_of(source.seed, "scales", block_id, 1000) for block_id in (0, 79, 5)]
        assert mapped["digests"] == [hashlib.sha256(block).hexdigest() for block in blocks]
        assert mapped["readonly"]


def test_a_peer_tells_lane_and_bandwidth(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        assert reader.call("unreachable", source.call("info")["info"]) is None
        peer = reader.import_site(source)
        assert peer.lane
        assert peer.bandwidth > 0
        assert reader.call("caps")["name"] == transfer_under_test.name
        reader.check()  # the probe wrote to no block


def shuffled_plan(random: Random) -> Copies:
    """Every block of every region, from a random place to a random place."""
    plan = {}
    for layout in LAYOUTS:
        blocks = range(layout.num_blocks)
        plan[layout.name] = (random.sample(blocks, len(blocks)), random.sample(blocks, len(blocks)))
    return plan


def plan_bytes(plan: Copies) -> int:
    sizes = {layout.name: layout.block_bytes for layout in LAYOUTS}
    return sum(len(targets) * sizes[name] for name, (_, targets) in plan.items())
