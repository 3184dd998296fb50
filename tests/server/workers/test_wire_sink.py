"""Between the engine's threads and the worker's socket: the outbox, and the sink that numbers, packs and remembers."""

import os
import sys
import threading

import pytest
import zmq

from trtserve.plugins.api import BlockHash, KVCleared, KVStored, Output, RequestId, StepOutputs, StoredBlock, WorkerLoad
from trtserve.server.workers import wire
from trtserve.server.workers.warm_up import WarmUpFailed, WarmUpWatch
from trtserve.server.workers.wire_sink import Outbox, OutboxFull, WireSink


@pytest.fixture
def outbox():
    outbox = Outbox(limit=4)
    yield outbox
    os.close(outbox.descriptor)


@pytest.fixture
def watch():
    return WarmUpWatch()


@pytest.fixture
def sink(outbox, watch):
    return WireSink(outbox, watch)


def phase(text):
    return lambda: wire.Progress(text)


def taken(outbox):
    return [message for data in iter(outbox.take, None) for message in wire.decode_from_worker(data)]


def stored(*numbers):
    """An event; blocks have no tokens here, as nobody looks at them."""
    return KVStored(None, tuple(StoredBlock(BlockHash(number), None) for number in numbers))


def test_the_outbox_wakes_its_reader_and_keeps_order(outbox):
    poller = zmq.Poller()
    poller.register(outbox.descriptor, zmq.POLLIN)
    assert not poller.poll(0)
    for text in ("a", "b"):
        outbox.put(phase(text))
    assert poller.poll(1000)
    outbox.reset()
    outbox.reset()  # nothing there is no error
    assert not poller.poll(0)
    assert taken(outbox) == [wire.Progress("a"), wire.Progress("b")]
    assert outbox.take() is None


def test_what_waits_goes_as_one_message_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("trtserve.server.workers.wire_sink._MOST_IN_BATCH", 3)
    monkeypatch.setattr("trtserve.server.workers.wire_sink._MOST_BATCH_BYTES", 100)
    outbox = Outbox()
    for text in ("a", "b", "c", "d", "e" * 200, "f", "g" * 90, "h"):
        outbox.put(phase(text))
    batches = [wire.decode_from_worker(data) for data in iter(outbox.take, None)]
    os.close(outbox.descriptor)
    assert ["".join(message.phase[0] for message in batch) for batch in batches] == ["abc", *"defgh"]


def test_a_full_outbox_makes_the_engine_wait_and_the_socket_s_thread_not(outbox, sink):
    """The thread that takes would otherwise wait for itself."""
    for text in "abcd":
        outbox.put(phase(text))
    engine = threading.Thread(target=outbox.put, args=(phase("e"),), daemon=True)
    engine.start()
    sink.push_blocks()
    assert taken(outbox)[:5] == [*map(wire.Progress, "abcd"), wire.Blocks(0, b"")]
    engine.join(10)
    assert not engine.is_alive()


def test_an_engine_does_not_wait_for_ever(outbox, monkeypatch):
    monkeypatch.setattr("trtserve.server.workers.wire_sink._LONGEST_WAIT_S", 0.01)
    with pytest.raises(OutboxFull, match="has not read its messages"):
        for text in "abcde":
            outbox.put(phase(text))
    assert len(taken(outbox)) == 4


def test_the_sink_numbers_steps_and_events(outbox, sink):
    for num_events in (2, 0, 3):
        sink.push(StepOutputs([Output(RequestId(5), [1])], WorkerLoad(running=num_events), [KVCleared()] * num_events))
    steps = taken(outbox)
    assert [(step.number, step.first_event, len(step.events)) for step in steps] == [(1, 0, 2), (2, 2, 0), (3, 2, 3)]
    assert (sink.steps, sink.load.running) == (3, 3)


def test_blocks_stand_between_the_steps_where_they_belong(outbox, sink):
    sink.push_blocks()
    sink.push(StepOutputs([], WorkerLoad(), [stored(1, 2), stored(3)]))
    sink.push_blocks()
    sink.push(StepOutputs([], WorkerLoad(), [KVCleared()]))
    empty, _, blocks, step = taken(outbox)
    assert empty == wire.Blocks(0, b"")
    assert (blocks.next_event, sorted(wire.hashes_of(blocks.hashes))) == (2, [1, 2, 3])
    assert step.first_event == 2


@pytest.fixture
def eager_threads():
    """Threads take turns as often as they can."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before_s)


def test_the_order_holds_while_the_engine_races(watch, eager_threads):
    """Whenever the socket's thread asks, the set is that of the steps before it, no more and no less."""
    outbox = Outbox()
    sink = WireSink(outbox, watch)
    num_steps = 2000

    def run():
        for number in range(num_steps):
            event = stored(number, number + 1) if number % 7 else KVCleared()
            sink.push(StepOutputs([], WorkerLoad(), [event]))

    engine = threading.Thread(target=run, daemon=True)
    engine.start()
    next_event, known, num_snapshots = 0, set(), 0
    while next_event < num_steps:
        sink.push_blocks()
        for message in taken(outbox):
            if isinstance(message, wire.Blocks):
                num_snapshots += 1
                assert (message.next_event, set(wire.hashes_of(message.hashes))) == (next_event, known)
                continue
            assert message.first_event == next_event
            next_event += len(message.events)
            for event in message.events:
                known = known | set(wire.hashes_of(event.hashes)) if isinstance(event, wire.Stored) else set()
    engine.join(10)
    assert num_snapshots > 1
    os.close(outbox.descriptor)


def test_who_sees_the_failure_finds_the_last_words(outbox, sink):
    """The socket's thread ends the process as soon as it sees that the engine failed, and may see it at any moment."""
    found = []

    class Seen(threading.Event):
        def set(self):
            super().set()
            self.reader = threading.Thread(target=lambda: found.extend(taken(outbox)), daemon=True)
            self.reader.start()
            self.reader.join(0.2)  # it takes what is there, or waits for what is being put

    sink.failed = Seen()
    sink.fail(ValueError("one"))
    sink.failed.reader.join(10)
    assert found == [wire.Failed("ValueError: one")]


def test_last_words_wait_for_no_room(outbox, sink):
    for text in "abcd":
        outbox.put(phase(text))
    sink.fail(ValueError("one"))
    assert taken(outbox)[-1] == wire.Failed("ValueError: one")


def test_the_sink_tells_of_the_first_failure_only(outbox, sink, watch):
    sink.fail(ValueError("one"))
    sink.fail(ValueError("two"))
    assert taken(outbox) == [wire.Failed("ValueError: one")]
    assert sink.failed.is_set()
    with pytest.raises(WarmUpFailed, match="ValueError: one"):
        watch.wait()
