"""The conformance suite of transfers: what workers rely on, as tests that any transfer's author can run.

Write a test module with a fixture `transfer_under_test` and import the tests into it:

    import pytest

    from trtserve.plugins.conformance.transfer import *


    @pytest.fixture
    def transfer_under_test():
        return TransferCase(plugin="my_package.transfer", name="mine", environment={"UCX_TLS": "tcp"})

`plugin` is the module that has the hook `make_transfer`. The tests start worker processes of their own, two or three
each, which import it, hold regions of host memory, read each other's, are killed and stopped; the tests' own process
never loads the transfer. A transfer's `caps` say what does not apply to it. A peer's death may end a read DONE, where
the bytes are right, or PEER_LOST; a stopped peer DONE or TIMED_OUT.
Failures of the suite's plain asserts read better after `pytest.register_assert_rewrite("trtserve.plugins.conformance")`
in a conftest.py.
"""

from __future__ import annotations

from trtserve.plugins.conformance.transfer_case import TransferCase
from trtserve.plugins.conformance.transfer_deaths import (
    test_a_dead_peer_cannot_be_imported,
    test_a_peer_that_died_before_the_read,
    test_a_peer_that_dies_after_the_read,
    test_a_peer_that_dies_during_the_read,
    test_a_reader_that_dies_does_no_harm,
    test_a_restarted_peer_is_another_one,
    test_a_stopped_peer_costs_no_more_than_the_deadline,
    test_the_import_of_a_stopped_peer_ends_in_time,
)
from trtserve.plugins.conformance.transfer_endings import (
    test_a_deadline_that_has_passed,
    test_a_dropped_peer_can_be_imported_again,
    test_cancel_after_the_end,
    test_cancel_right_after_the_beginning,
    test_close_during_a_read,
    test_drop_peer_during_a_read,
    test_nothing_is_left,
)
from trtserve.plugins.conformance.transfer_reads import (
    test_a_peer_tells_lane_and_bandwidth,
    test_all_blocks_of_several_regions_in_any_order,
    test_an_empty_plan_is_done,
    test_many_megabytes,
    test_many_reads_of_two_peers_at_once,
    test_mapped_blocks_are_the_peers_bytes,
    test_numbers_of_blocks_and_strides_may_differ,
    test_single_and_adjacent_and_scattered_blocks,
    test_two_workers_read_each_other_at_once,
)
from trtserve.plugins.conformance.transfer_refusals import (
    test_bad_plans_raise_and_copy_nothing,
    test_bad_regions_are_refused,
    test_exports_of_others_are_refused,
    test_other_machines_are_unreachable_unless_caps_say_so,
    test_regions_of_other_block_sizes_are_refused,
    test_what_is_no_export_is_refused,
)

__all__ = [
    "TransferCase",
    "test_a_dead_peer_cannot_be_imported",
    "test_a_deadline_that_has_passed",
    "test_a_dropped_peer_can_be_imported_again",
    "test_a_peer_tells_lane_and_bandwidth",
    "test_a_peer_that_died_before_the_read",
    "test_a_peer_that_dies_after_the_read",
    "test_a_peer_that_dies_during_the_read",
    "test_a_reader_that_dies_does_no_harm",
    "test_a_restarted_peer_is_another_one",
    "test_a_stopped_peer_costs_no_more_than_the_deadline",
    "test_all_blocks_of_several_regions_in_any_order",
    "test_an_empty_plan_is_done",
    "test_bad_plans_raise_and_copy_nothing",
    "test_bad_regions_are_refused",
    "test_cancel_after_the_end",
    "test_cancel_right_after_the_beginning",
    "test_close_during_a_read",
    "test_drop_peer_during_a_read",
    "test_exports_of_others_are_refused",
    "test_many_megabytes",
    "test_many_reads_of_two_peers_at_once",
    "test_mapped_blocks_are_the_peers_bytes",
    "test_nothing_is_left",
    "test_numbers_of_blocks_and_strides_may_differ",
    "test_other_machines_are_unreachable_unless_caps_say_so",
    "test_regions_of_other_block_sizes_are_refused",
    "test_single_and_adjacent_and_scattered_blocks",
    "test_the_import_of_a_stopped_peer_ends_in_time",
    "test_two_workers_read_each_other_at_once",
    "test_what_is_no_export_is_refused",
]
