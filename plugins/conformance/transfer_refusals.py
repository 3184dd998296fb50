"""Conformance of a transfer: what it must refuse. Run through `trtserve.plugins.conformance.transfer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from trtserve.plugins.conformance.transfer_case import (
    Copies,
    Layout,
    SiteProcess,
    SiteRaised,
    TransferCase,
)
from trtserve.plugins.transfer_api import TransferOutcome

BAD_PLANS: list[Copies] = [
    {"keys": ([64], [0])},
    {"keys": ([0], [64])},
    {"keys": ([0, -1], [0, 1])},
    {"keys": ([0, 1], [0, -1])},
    {"keys": ([2**31 - 1], [0])},
    {"keys": ([0, 1], [0])},
    {"keys": ([0, 1], [5, 5])},
    {"values": ([0], [0])},
    {"keys": ([0], [0]), "scales": ([96], [0])},  # the first half is right: nothing of it may be copied
]


def test_bad_plans_raise_and_copy_nothing(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        peer = reader.import_site(source)
        for plan in BAD_PLANS:
            assert raised_by(partial(reader.begin, peer, plan)) == "ValueError", plan
        reader.check()
        assert reader.read(peer, {"keys": ([1], [2])}).outcome is TransferOutcome.DONE


def test_what_is_no_export_is_refused(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source = deployment.sites("reader", "source")
        told = source.call("info")
        export: bytes = told["export"]
        cuts = [export[:length] for length in range(0, len(export), max(1, len(export) // 40))]
        # Last: a pickle that would end the process, were it loaded.
        for garbage in [*cuts, bytes(64), b"\xff" * 64, export + b"\0", b"cos\n_exit\n(I7\ntR."]:
            assert _refuses(reader, {**told, "export": garbage}, source.seed), garbage[:80]
        peer = reader.import_export(told, source.seed)
        assert reader.read(peer, {"keys": ([1], [2])}).outcome is TransferOutcome.DONE


def test_exports_of_others_are_refused(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader, source, other = deployment.sites("reader", "source", "other")
        told, export = source.call("info"), other.call("info")["export"]
        assert _refuses(reader, {**told, "export": export}, source.seed), "an export of another worker"
        restarted = {**told["info"], "incarnation": 2}
        assert _refuses(reader, {**told, "info": restarted}, source.seed), "an export of an earlier incarnation"


def test_regions_of_other_block_sizes_are_refused(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        reader = deployment.site("reader", [Layout("keys", 8, 4096, 4096)])
        source = deployment.site("source", [Layout("keys", 8, 2048, 4096)])
        assert _refuses(reader, source.call("info"), source.seed)


def test_other_machines_are_unreachable_unless_caps_say_so(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        site = deployment.site("reader")
        info = {**site.call("info")["info"], "worker_id": "far", "boot_id": "another", "host": "192.0.2.7"}
        why = site.call("unreachable", info)
        assert site.call("caps")["across_nodes"] or why, "it says why"


def test_bad_regions_are_refused(transfer_under_test: TransferCase) -> None:
    with transfer_under_test.deployment() as deployment:
        site = deployment.site("site")
        assert raised_by(lambda: site.call("register", "keys", 8, 4096, 4096, False)) == "TransferError", "same name"
        assert raised_by(lambda: site.call("register", "lap", 8, 4096, 2048, False)) == "TransferError", "overlapping"
        if site.call("caps")["owns_memory"]:
            assert raised_by(lambda: site.call("register", "own", 8, 4096, 4096, True)) == "TransferError"
        site.check()


def raised_by(call: Callable[[], Any]) -> str:
    """The class of what a command raised; "" if it did not."""
    try:
        call()
    except SiteRaised as error:
        return error.kind
    return ""


def _refuses(reader: SiteProcess, told: dict[str, Any], seed: str) -> bool:
    return raised_by(lambda: reader.import_export(told, seed)) == "TransferError"
