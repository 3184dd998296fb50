"""What is written at a commit, where the prefix cache has changed since the fetch began."""

from array import array
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest

from tests.server.workers.test_kv_client import OWN
from trtserve.plugins.api import RequestId, WorkerId
from trtserve.plugins.transfer_api import Completion, TransferId, TransferOutcome
from trtserve.server.workers.kv_connections import Connection
from trtserve.server.workers.kv_fetcher import Fetcher
from trtserve.server.workers.kv_messages import KVFetch, pack_rows
from trtserve.server.workers.kv_staging import Staging


@dataclass
class Store:
    """Has as many blocks of every prompt as the test says, and writes down what it gets."""

    stored: int = 0
    written: list[tuple[int, list[int]]] = field(default_factory=list)
    error: Exception | None = None

    def stored_blocks(self, tokens, cache_salt):
        return self.stored

    def write_kv(self, tokens, cache_salt, first_block, rows):
        if self.error is not None:
            raise self.error
        self.written.append((first_block, list(rows)))
        return len(rows)


def call(function):
    """At once."""
    future = Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future


class Thread:
    """Everything is done at once, and every read succeeds."""

    def post(self, function):
        function()

    def read(self, read):
        num_bytes = 64 * len(read.plan.copies[0].targets)
        read.ended(Completion(TransferId(1), TransferOutcome.DONE, num_bytes, 0.0))


class Peer:
    """Somewhere."""

    info = OWN
    lane = "wire"
    bandwidth_bytes_per_s = 1e9


class Connections:
    """To one peer."""

    def find(self, worker_id, incarnation):
        return Connection(None, Peer())


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def staging():
    return Staging(16)


@pytest.fixture
def reports():
    return []


@pytest.fixture
def fetcher(store, staging, reports):
    return Fetcher(store, call, staging, Thread(), Connections(), 64, reports.append)


def order(number=1, first_block=0, num_rows=10):
    prompt = array("i", [1] * 200).tobytes()
    rows = pack_rows(range(num_rows))
    return KVFetch(RequestId(number), prompt, "", WorkerId("prefill-0"), 1, first_block, rows, True)


@pytest.mark.parametrize(
    ("before", "after", "written"),
    [
        (0, 0, [(0, list(range(10)))]),
        (4, 4, [(4, list(range(6)))]),
        (4, 7, [(7, [3, 4, 5])]),  # another request stored some
        (4, 10, []),
        (4, 3, []),  # what the rest would follow was evicted
    ],
)
def test_only_what_follows_the_prefix_cache_is_written(fetcher, store, staging, reports, before, after, written):
    store.stored = before
    fetcher.fetch(order())
    assert (reports[0].ok, reports[0].num_blocks, reports[0].num_bytes) == (True, 10 - before, 64 * (10 - before))
    store.stored = after
    fetcher.commit(RequestId(1), True)
    assert store.written == written
    assert fetcher.num_written == sum(len(rows) for _, rows in written)
    assert (fetcher.num_open, staging.usage().rows_free) == (0, 16)


def test_an_engine_that_does_not_take_it_is_counted(fetcher, store, staging):
    fetcher.fetch(order())
    store.error = ValueError("wrong bytes")
    fetcher.commit(RequestId(1), True)
    assert (fetcher.num_write_failures, fetcher.num_written) == (1, 0)
    assert (fetcher.num_open, staging.usage().rows_free) == (0, 16)


def test_the_number_of_fetches_is_bounded(fetcher, reports, monkeypatch):
    monkeypatch.setattr("trtserve.server.workers.kv_fetcher.MAX_FETCHES", 2)
    for number in (1, 2, 3):
        fetcher.fetch(order(number, num_rows=1))
    assert [report.ok for report in reports] == [True, True, False]
    assert "2 fetches are under way" in reports[-1].reason
    fetcher.abort(RequestId(1))
    fetcher.fetch(order(4, num_rows=1))
    assert reports[-1].ok


def test_a_gap_is_not_read_over(fetcher, reports):
    fetcher.fetch(order(first_block=3))
    assert (reports[0].ok, reports[0].num_blocks) == (True, 0)
