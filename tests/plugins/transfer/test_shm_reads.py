"""The queue of reads, with its real threads."""

import os
import select
from random import Random

import pytest

from trtserve.plugins.transfer.runs import Run
from trtserve.plugins.transfer.shm import reads
from trtserve.plugins.transfer.shm.reads import PIECE_BYTES, Read, ReadQueue
from trtserve.plugins.transfer.shm.segment import address_of
from trtserve.plugins.transfer_api import TransferId, TransferOutcome

SIZE = 3 * PIECE_BYTES


@pytest.fixture
def queue():
    made = ReadQueue(2)
    yield made
    made.close()


def collected(queue, number):
    found = []
    while len(found) < number:
        assert select.select([queue.event_fd], [], [], 10)[0], f"{len(found)} of {number} completions came"
        found += queue.collect()
    return found


def test_every_read_ends_once_whatever_is_stopped():
    source, random = bytearray(os.urandom(SIZE)), Random(1)
    queue, peers = ReadQueue(3), [object(), object()]
    targets = [bytearray(SIZE) for _ in range(12)]
    for number, target in enumerate(targets):
        run = Run(address_of(source), address_of(target), SIZE)
        queue.add(Read(TransferId(number), peers[number % 2], [run], deadline_s=30))
        if random.random() < 0.4:
            queue.stop(TransferId(random.randrange(number + 1)), TransferOutcome.CANCELLED, "test")
    queue.stop_all_of(peers[1], "test")
    ended = collected(queue, len(targets))
    assert sorted(end.transfer_id for end in ended) == list(range(len(targets)))
    assert queue.num_active == 0
    for end in ended:
        assert (end.outcome is TransferOutcome.DONE) <= (targets[end.transfer_id] == source)
    assert queue.collect() == []
    queue.close()


def test_stop_says_whether_anything_is_still_written(queue, monkeypatch):
    begun, go_on = os.pipe(), os.pipe()

    def copy_slowly(runs):
        os.write(begun[1], b".")
        os.read(go_on[0], 1)

    monkeypatch.setattr(reads, "copy_piece", copy_slowly)
    memory = bytearray(64)
    run = Run(address_of(memory), address_of(memory) + 32, 32)
    queue.add(Read(TransferId(1), self_ := object(), [run], deadline_s=30))
    os.read(begun[0], 1)
    assert not queue.stop(TransferId(1), TransferOutcome.CANCELLED, "test"), "a piece is being copied"
    assert queue.collect() == []
    os.write(go_on[1], b".")
    (ended,) = collected(queue, 1)
    assert (ended.outcome, ended.reason) == (TransferOutcome.CANCELLED, "test")
    assert queue.stop(TransferId(1), TransferOutcome.CANCELLED, "again")
    queue.stop_all_of(self_, "test")
    assert queue.collect() == []
    for descriptor in (*begun, *go_on):
        os.close(descriptor)


def test_a_read_past_its_deadline_copies_nothing(queue):
    source, target = bytearray(b"x" * 64), bytearray(64)
    runs = [Run(address_of(source), address_of(target), 64)]
    small = Read(TransferId(1), None, runs, deadline_s=0)
    queue.add(small, is_small=True)
    queue.help(small, 1.0)
    queue.add(Read(TransferId(2), None, runs, deadline_s=-1))
    ended = collected(queue, 2)
    assert [end.outcome for end in ended] == [TransferOutcome.TIMED_OUT] * 2
    assert [end.num_bytes for end in ended] == [0, 0]
    assert target == bytes(64)


def test_a_copy_that_fails_fails_its_read_alone(queue, monkeypatch):
    def fail(runs):
        raise MemoryError("no room")

    memory = bytearray(64)
    run = Run(address_of(memory), address_of(memory) + 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(reads, "copy_piece", fail)
        queue.add(Read(TransferId(1), None, [run], deadline_s=30))
        (ended,) = collected(queue, 1)
    assert ended.outcome is TransferOutcome.FAILED
    assert "no room" in ended.reason
    queue.add(Read(TransferId(2), None, [run], deadline_s=30))
    assert collected(queue, 1)[0].outcome is TransferOutcome.DONE
