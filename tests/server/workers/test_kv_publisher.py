"""What is asked of the engine after each step, and what becomes of an engine that does not answer well."""

from array import array
from dataclasses import dataclass, field

import pytest

from trtserve.plugins.api import (
    FinishReason,
    Output,
    PassStats,
    Request,
    RequestId,
    SamplingParams,
    StepOutputs,
    WorkerLoad,
)
from trtserve.server.workers.kv_messages import rows_of
from trtserve.server.workers.kv_publisher import Publisher
from trtserve.server.workers.kv_staging import Staging

PREFILL = PassStats(0.1, 64, 0, 0)
DECODE = PassStats(0.1, 0, 3, 100)


@dataclass
class Store:
    """Has as many blocks of every prompt as the test says, and writes down what it is asked."""

    stored: int = 0
    asked: list[int] = field(default_factory=list)
    error: Exception | None = None

    def stored_blocks(self, tokens, cache_salt):
        self.asked.append(tokens[0])
        return self.stored

    def read_kv(self, tokens, cache_salt, first_block, rows):
        if self.error is not None:
            raise self.error
        return len(rows)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def staging():
    return Staging(32)


@pytest.fixture
def published():
    return []


@pytest.fixture
def publisher(store, staging, published):
    return Publisher(store, staging, 64, published.append)


def expect(publisher, number, num_tokens=100):
    publisher.expect(Request(RequestId(number), array("i", [number] * num_tokens), SamplingParams(1)))


def step(*outputs, stats=PREFILL):
    return StepOutputs(outputs, WorkerLoad(), stats=stats)


def first_token(number, finish_reason=FinishReason.LENGTH):
    return Output(RequestId(number), [5], finish_reason)


def test_nobody_is_asked_for_requests_whose_kv_is_not_kept(publisher, store, published):
    publisher.after_step(step(first_token(1)))
    expect(publisher, 2, num_tokens=64)
    publisher.after_step(step(first_token(1)))
    assert not store.asked and not published


def test_the_two_oldest_long_prompts_are_looked_at_after_a_prefill_pass(publisher, store):
    for number in range(1, 5):
        expect(publisher, number)
    publisher.after_step(step(stats=DECODE))
    assert not store.asked
    publisher.after_step(step())
    publisher.after_step(step(first_token(1)))
    assert store.asked == [1, 2, 1, 2, 3]


def test_blocks_are_published_once_and_in_order(publisher, store, published):
    expect(publisher, 1)
    for stored in (0, 3, 3, 5):
        store.stored = stored
        publisher.after_step(step())
    publisher.after_step(step(first_token(1)))
    publisher.after_step(step(first_token(1)))
    said = [(message.first_block, len(rows_of(message.rows)), message.is_final) for message in published]
    assert said == [(0, 3, False), (3, 2, False), (5, 0, True)]
    assert len({message.lease_id for message in published}) == 1


@pytest.mark.parametrize("finish_reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_a_request_that_ends_without_a_token_keeps_nothing(publisher, store, staging, published, finish_reason):
    store.stored = 3
    expect(publisher, 1)
    publisher.after_step(step())
    assert staging.usage().rows_leased == 3
    publisher.after_step(step(Output(RequestId(1), [], finish_reason)))
    assert (published[-1].lease_id, published[-1].is_final) == (0, True)
    assert staging.usage().rows_free == 32


def test_a_lease_that_ended_meanwhile_takes_no_more_rows(publisher, store, staging, published):
    store.stored = 3
    expect(publisher, 1)
    publisher.after_step(step())
    assert staging.release(published[0].lease_id)
    store.stored = 6
    publisher.after_step(step(first_token(1)))
    assert (len(published[-1].rows), published[-1].is_final) == (0, True)
    assert staging.usage().rows_free == 32


def test_an_engine_that_fails_to_give_its_kv_goes_on(publisher, store, staging, published):
    store.stored, store.error = 3, RuntimeError("no memory")
    expect(publisher, 1)
    publisher.after_step(step(first_token(1)))
    assert (published[-1].lease_id, published[-1].rows, published[-1].is_final) == (0, b"", True)
    assert (staging.usage().rows_free, publisher.num_unpublished) == (32, 3)
