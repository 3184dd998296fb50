"""Messages survive their bytes, packed arrays keep their meaning, and foreign bytes are refused in one way."""

from array import array

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.workers.messages import EVENT, FROM_WORKER, HASH, REQUEST, STEP, TO_WORKER
from trtserve.plugins.api import (
    FinishReason,
    KVCleared,
    KVRemoved,
    KVStored,
    Output,
    RequestId,
    StepOutputs,
    WorkerLoad,
)
from trtserve.server.workers import wire


@settings(deadline=None)
@given(FROM_WORKER)
def test_messages_of_workers_survive(message):
    assert wire.decode_from_worker(wire.encode(message)) == (message,)


@settings(deadline=None)
@given(st.lists(FROM_WORKER, min_size=1, max_size=40))
def test_a_batch_is_its_messages(messages):
    assert list(wire.decode_from_worker(wire.batch_of(list(map(wire.encode, messages))))) == messages


def test_batches_are_not_in_batches():
    batch = wire.batch_of([wire.encode(wire.Failed("a")), wire.encode(wire.Failed("b"))])
    with pytest.raises(wire.WireError):
        wire.decode_from_worker(wire.batch_of([batch, batch]))


@settings(deadline=None)
@given(TO_WORKER)
def test_messages_to_workers_survive(message):
    assert wire.decode_to_worker(wire.encode(message)) == message


@settings(deadline=None)
@given(REQUEST)
def test_a_request_arrives_as_it_was(request):
    message = wire.decode_to_worker(wire.encode(wire.submit_of(request)))
    assert wire.request_of(message) == request


@pytest.mark.parametrize("packed", [b"", b"\0", b"\0" * 6])
def test_a_prompt_is_whole_tokens(request_of_one_token, packed):
    message = msgspec.structs.replace(wire.submit_of(request_of_one_token), prompt=packed)
    with pytest.raises(wire.WireError, match=f"{len(packed)} bytes"):
        wire.request_of(message)


def unpacked(step: wire.Step):
    """Rows of (request id, tokens)."""
    ids, tokens = array("Q", step.request_ids).tolist(), wire.token_ids_of(step.token_ids).tolist()
    counts = array("H", step.counts).tolist() if step.counts else [1] * len(ids)
    assert sum(counts) == len(tokens)
    ends = [sum(counts[: row + 1]) for row in range(len(counts))]
    return [(i, tokens[end - count : end]) for i, count, end in zip(ids, counts, ends, strict=True)]


@settings(deadline=None)
@given(STEP, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_step_says_all_that_the_engine_said(outputs, number, first_event):
    (step,) = wire.decode_from_worker(wire.encode(wire.step_of(number, first_event, outputs)))
    assert (step.number, step.first_event, step.load, step.stats) == (number, first_event, outputs.load, outputs.stats)
    assert step.rank == outputs.rank
    assert unpacked(step) == [(output.request_id, output.token_ids) for output in outputs.outputs if output.token_ids]
    details = {detail.request_id: detail for detail in step.details}
    for output in outputs.outputs:
        detail = details.pop(output.request_id, wire.Detail(output.request_id))
        assert detail.finish_reason == output.finish_reason
        assert (detail.cached_tokens, detail.logprobs) == (output.cached_tokens, output.logprobs)
        assert detail.kv_handle == output.kv_handle
        if output.finish_reason is not None:
            assert (detail.stop_token_id, detail.error) == (output.stop_token_id, output.error)
            assert (detail.kv_lost, detail.is_refused) == (output.kv_lost, output.is_refused)
            assert detail.speculation == output.speculation
    assert not details and len(step.events) == len(outputs.events)


@pytest.mark.parametrize(
    ("rows", "has_counts"),
    [([], False), ([[1]], False), ([[1], [2], []], False), ([[1], [2, 3]], True), ([[1, 2], []], True)],
)
def test_counts_are_sent_only_where_they_differ_from_one(rows, has_counts):
    outputs = [Output(RequestId(number), tokens) for number, tokens in enumerate(rows, 1)]
    step = wire.step_of(1, 0, StepOutputs(outputs, WorkerLoad()))
    assert bool(step.counts) is has_counts
    assert unpacked(step) == [(number, tokens) for number, tokens in enumerate(rows, 1) if tokens]


def test_the_usual_row_is_small():
    """Twelve bytes a row: nothing else is said of a request that just goes on."""
    one, many = (
        len(wire.encode(wire.step_of(1, 0, StepOutputs([Output(RequestId(i), [5]) for i in range(n)], WorkerLoad()))))
        for n in (1, 101)
    )
    assert many - one <= 12 * 100 + 8


@settings(deadline=None)
@given(EVENT)
def test_events_keep_their_hashes(event):
    packed = wire.event_of(event)
    match event:
        case KVStored(parent, blocks):
            assert packed.parent == parent
            assert list(wire.hashes_of(packed.hashes)) == [block.hash for block in blocks]
        case KVRemoved(hashes):
            assert list(wire.hashes_of(packed.hashes)) == list(hashes)
        case KVCleared():
            assert packed == wire.Cleared()


@given(st.sets(HASH, max_size=9), st.integers(0, 9))
def test_blocks_beyond_the_limit_are_left_out(hashes, limit):
    packed = wire.hashes_of(wire.blocks_of(5, hashes, limit=limit).hashes)
    assert len(set(packed)) == len(packed) == min(limit, len(hashes)) and set(packed) <= hashes


def test_the_most_blocks_fit_one_message():
    """Their bytes, a tag, an event's number and what msgpack adds."""
    frame = len(wire.encode(wire.Blocks(2**64 - 1, b"\0" * 2**17))) - 2**17
    assert wire.MAX_BLOCKS * 8 + frame <= wire.MAX_MESSAGE_BYTES


@pytest.mark.parametrize("packed", [b"\0", b"\0" * 12])
def test_hashes_are_whole(packed):
    with pytest.raises(ValueError, match="multiple of item size"):
        wire.hashes_of(packed)


def decodes_or_is_refused(data):
    for decode in (wire.decode_from_worker, wire.decode_to_worker):
        try:
            decode(data)
        except wire.WireError:
            continue


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(data):
    decodes_or_is_refused(data)


@settings(max_examples=300, deadline=None)
@given(st.one_of(FROM_WORKER, TO_WORKER).map(wire.encode), st.data())
def test_damaged_messages_decode_or_are_refused(data, damage):
    damaged = bytearray(data)
    for _ in range(damage.draw(st.integers(1, 4))):
        damaged[damage.draw(st.integers(0, len(damaged) - 1))] = damage.draw(st.integers(0, 255))
    decodes_or_is_refused(bytes(damaged[: damage.draw(st.integers(0, len(damaged)))]))


@pytest.mark.parametrize(
    "data",
    [
        b"\x92\xa8progress\xa2\xff\xfe",  # no UTF-8
        b"\x92\xa2\xff\xfe\x01",  # no UTF-8 in the tag
        b"\x93\xa7welcome" + b"\x91" * 200_000,  # deeper than a stack
        b"\x9a\xa4step\x01\xc4\x00\xc4\x00\xc4\x00\xdd\xff\xff\xff\xff",  # four thousand million details
        b"\x92\xa8progress\xdb\xff\xff\xff\xff",  # a text of 4 GiB
    ],
    ids=["text", "tag", "deep", "many", "long"],
)
def test_hostile_bytes_are_refused(data):
    decodes_or_is_refused(data)


@settings(deadline=None)
@given(FROM_WORKER)
def test_directions_do_not_mix(message):
    with pytest.raises(wire.WireError):
        wire.decode_to_worker(wire.encode(message))


def test_finish_reasons_travel_by_their_names():
    for reason in FinishReason:
        step = wire.step_of(1, 0, StepOutputs([Output(RequestId(1), (), reason)], WorkerLoad()))
        assert wire.decode_from_worker(wire.encode(step))[0].details[0].finish_reason == reason.value
