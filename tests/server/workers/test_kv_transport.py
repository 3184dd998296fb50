"""The thread that owns a worker's transfers: what becomes of reads that wait when their peer goes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import count

import pytest

from trtserve.plugins.transfer_api import BlockCopies, ReadPlan, TransferId, TransferOutcome
from trtserve.server.workers.kv_transport import MAX_READS, Read, TransportThread

PLAN = ReadPlan([BlockCopies("kv", array("i", [0]), array("i", [0]))])


@dataclass
class Endless:
    """A transfer whose reads never end by themselves."""

    name: str = "endless"
    dropped: list = field(default_factory=list)
    ids: count = field(default_factory=count)

    def read_blocks(self, peer, plan, deadline_s):
        return TransferId(next(self.ids))

    def poll(self):
        return []

    def wakeup_fd(self):
        return None

    def tick_s(self):
        return 0.0

    def cancel(self, transfer_id):
        pass

    def drop_peer(self, peer):
        self.dropped.append(peer)

    def close(self):
        pass


@pytest.fixture
def thread():
    thread = TransportThread()
    yield thread
    thread.close()


def test_a_peer_is_dropped_though_the_end_of_one_waiting_read_cancels_the_others(thread):
    transfer, peer, ends = Endless(), object(), []
    reads: list[Read] = []

    def ended(completion) -> None:
        ends.append(completion.outcome)
        for read in reads:  # as a fetch does, of which one part has failed
            thread.cancel(read)

    def drop() -> None:
        thread.add(transfer)
        reads.extend(Read(transfer, peer, PLAN, 9.0, ended, overdue=lambda: None) for _ in range(MAX_READS + 3))
        for read in reads:
            thread.read(read)
        thread.drop_peer(transfer, peer)

    thread.call(drop, 5.0)
    assert transfer.dropped == [peer]
    assert ends == [TransferOutcome.PEER_LOST, TransferOutcome.CANCELLED, TransferOutcome.CANCELLED]
