"""Steps that wait for the socket join, and say together what each of them said."""

import os
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import (
    FinishReason,
    KVRemoved,
    Output,
    PassStats,
    RequestId,
    StepOutputs,
    WorkerLoad,
)
from trtserve.server.workers import wire
from trtserve.server.workers.plain_steps import PlainSteps, is_plain
from trtserve.server.workers.warm_up import WarmUpWatch
from trtserve.server.workers.wire_sink import Outbox, WireSink

DECODE = PassStats(0.005, 0, 2, 100)


def plain(*rows, free_blocks=0, rank=0):
    """A step that gives these requests one token each."""
    outputs = [Output(RequestId(request), [token]) for request, token in rows]
    return StepOutputs(outputs, WorkerLoad(free_blocks=free_blocks), (), DECODE, rank)


OUTPUTS = st.lists(
    st.builds(
        Output,
        st.integers(0, 2).map(RequestId),
        st.lists(st.integers(0, 99), max_size=3),
        st.sampled_from([None] * 6 + [FinishReason.STOP]),
        cached_tokens=st.sampled_from([None] * 6 + [5]),
    ),
    max_size=3,
    unique_by=lambda output: output.request_id,
)
STEPS = st.lists(
    st.builds(
        StepOutputs,
        OUTPUTS | st.just([Output(RequestId(0), [1]), Output(RequestId(1), [2])]),
        st.builds(WorkerLoad, free_blocks=st.integers(0, 9)),
        st.sampled_from([(), (), (), (KVRemoved(()),)]),
        st.sampled_from([DECODE, DECODE, PassStats(0.01, 7, 1, 9), None]),
        st.sampled_from([0, 0, 0, 1]),
    ),
    max_size=30,
)


def heard(messages):
    """What the server learns: of each request, its tokens and what else was said, in order; of each rank, its events
    and its last load; and how many steps there were."""
    requests, events, loads, number = defaultdict(list), defaultdict(list), {}, 0
    for step in messages:
        assert step.number > number
        number = step.number
        ids = memoryview(step.request_ids).cast("Q").tolist()
        counts = memoryview(step.counts).cast("H").tolist() if step.counts else [1] * len(ids)
        tokens = iter(memoryview(step.token_ids).cast("i").tolist())
        for request_id, count in zip(ids, counts, strict=True):
            requests[request_id] += [next(tokens) for _ in range(count)]
        assert not list(tokens)
        for detail in step.details:
            requests[int(detail.request_id)].append((detail.finish_reason, detail.cached_tokens))
        events[step.rank] += [(step.first_event + place, event) for place, event in enumerate(step.events)]
        loads[step.rank] = step.load
    return dict(requests), dict(events), loads, number


@given(STEPS, st.sets(st.integers(0, 29)))
def test_joined_or_not_the_server_hears_the_same(steps, taken_after):
    def said(take_after):
        outbox = Outbox()
        sink, messages = WireSink(outbox, WarmUpWatch()), []
        for place, step in enumerate(steps):
            sink.push(step)
            if place in take_after or place == len(steps) - 1:
                messages += [message for data in iter(outbox.take, None) for message in wire.decode_from_worker(data)]
        os.close(outbox.descriptor)
        return messages

    one_by_one, joined = said(range(len(steps))), said(taken_after)
    assert len(one_by_one) == len(steps) >= len(joined)
    assert heard(joined) == heard(one_by_one)


def packed(number, step):
    return wire.step_of(number, 3, step)


def test_steps_of_the_same_requests_are_one():
    steps = PlainSteps(packed(7, plain((1, 10), (2, 20))))
    assert steps.join(packed(8, plain((1, 11), (2, 21), free_blocks=4)))
    message = steps.message()
    assert (message.number, message.first_event, message.load.free_blocks) == (8, 3, 4)
    assert memoryview(message.token_ids).cast("i").tolist() == [10, 11, 20, 21]
    assert memoryview(message.counts).cast("H").tolist() == [2, 2]


@pytest.mark.parametrize("other", [plain((1, 11)), plain((2, 21), (1, 11)), plain((1, 11), (2, 21), rank=1)])
def test_steps_of_others_are_not(other):
    steps = PlainSteps(packed(7, plain((1, 10), (2, 20))))
    assert not steps.join(packed(8, other))
    assert steps.message() == wire.step_of(7, 3, plain((1, 10), (2, 20)))


def test_so_many_join_and_no_more():
    steps = PlainSteps(packed(1, plain((1, 1))))
    assert [steps.join(packed(number, plain((1, number)))) for number in range(2, 70)] == [True] * 63 + [False] * 5


def test_a_prompt_or_anything_rare_makes_a_step_of_its_own():
    def joins(*outputs, events=(), stats=DECODE):
        return is_plain(packed(1, StepOutputs(outputs, WorkerLoad(), events, stats)))

    assert joins(Output(RequestId(1), [1]))
    assert not joins(Output(RequestId(1), [1]), stats=PassStats(0.005, 9, 1, 9))
    assert not joins(Output(RequestId(1), [1]), stats=None)
    assert not joins(Output(RequestId(1), [1]), events=(KVRemoved(()),))
    assert not joins(Output(RequestId(1), [1], FinishReason.LENGTH))
    assert not joins(Output(RequestId(1), [1, 2]))
    assert not joins(Output(RequestId(1)))
    assert not joins()
