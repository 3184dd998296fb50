"""Between the engine's threads and the worker's socket: the outbox, and the sink that numbers and packs."""

import os

import zmq

from trtserve.plugins.api import FinishReason, KVCleared, Output, RequestId, StepOutputs, WorkerLoad
from trtserve.server.workers import wire
from trtserve.server.workers.worker import Outbox, WireSink

WARM_UP_ID = 0


def test_the_outbox_wakes_its_reader_and_keeps_order():
    outbox = Outbox()
    poller = zmq.Poller()
    poller.register(outbox.descriptor, zmq.POLLIN)
    assert not poller.poll(0)
    for data in (b"a", b"b"):
        outbox.put(data)
    assert poller.poll(1000)
    outbox.reset()
    outbox.reset()  # nothing there is no error
    assert not poller.poll(0)
    assert [outbox.take(), outbox.take(), outbox.take()] == [b"a", b"b", None]
    os.close(outbox.descriptor)


def taken(outbox):
    return [wire.decode_from_worker(data) for data in iter(outbox.take, None)]


def test_the_sink_numbers_steps_and_events():
    outbox = Outbox()
    sink = WireSink(outbox)
    for num_events in (2, 0, 3):
        sink.push(StepOutputs([Output(RequestId(5), [1])], WorkerLoad(running=num_events), [KVCleared()] * num_events))
    steps = taken(outbox)
    assert [(step.number, step.first_event, len(step.events)) for step in steps] == [(1, 0, 2), (2, 2, 0), (3, 2, 3)]
    assert (sink.steps, sink.load.running) == (3, 3)
    assert not sink.warm.is_set()
    os.close(outbox.descriptor)


def test_the_sink_sees_the_warm_up_end_and_fail():
    for reason, error in ((FinishReason.LENGTH, None), (FinishReason.ERROR, "no room")):
        outbox = Outbox()
        sink = WireSink(outbox)
        sink.push(StepOutputs([Output(RequestId(WARM_UP_ID), (), reason, error=error)], WorkerLoad()))
        assert sink.warm.is_set()
        assert sink.error == (error and "the warm-up request failed: no room")
        os.close(outbox.descriptor)


def test_the_sink_tells_of_the_first_failure_only():
    outbox = Outbox()
    sink = WireSink(outbox)
    sink.fail(ValueError("one"))
    sink.fail(ValueError("two"))
    assert taken(outbox) == [wire.Failed("ValueError: one")]
    assert sink.failed.is_set() and sink.warm.is_set()
    os.close(outbox.descriptor)
