"""Disaggregated serving as a sequence of phases, against a cluster that plays what it is told to."""

import asyncio
from array import array

import pytest
from msgspec.structs import replace

from trtserve.plugins.api import (
    Finish,
    FinishReason,
    KVHandle,
    ModeConfig,
    Prediction,
    Request,
    RequestId,
    Role,
    SamplingParams,
    WorkerFailure,
    WorkerId,
)
from trtserve.plugins.modes.disagg import DisaggregatedMode, make_mode

PROMPT = list(range(100, 140))


class Lost(WorkerFailure):
    pass


class PlayedHandOver:
    def __init__(self, cluster):
        self._cluster = cluster
        self.began_on = []
        self.early = asyncio.Event()
        self.is_open = False
        self.handle = None  # of an engine that moves KV itself
        self.num_taken_back = 0

    async def __aenter__(self):
        self.is_open = True
        return self

    async def __aexit__(self, *error):
        self.is_open = False

    async def published(self):
        await self.early.wait()

    def begin(self, decode):
        if decode.worker_id not in self.began_on:
            self.began_on.append(decode.worker_id)

    async def complete(self):
        return self._cluster.transfers.pop(0) if self._cluster.transfers else True

    def give(self, request):
        handle, self.handle = self.handle, None
        return request if handle is None else replace(request, kv_handle=handle)

    def take_back(self):
        self.num_taken_back += 1


class Placement:
    def __init__(self, cluster, role, number):
        self.worker_id = WorkerId(f"{role}-{number}")
        self._cluster = cluster

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._cluster.booked.remove(self)


MOVED = ["remote_prefill", "prefill_moved_to_decode"]
ANY_WORKER = dict.fromkeys(Role, Prediction(0.0, 1.0, 10, 0))


class PlayedCluster:
    """`runs`: what each run does, in order: a list of tokens and a Finish, a Lost, or an event to wait for."""

    def __init__(self, *runs, transfers=(), predictions=None):
        self.runs, self.transfers = list(runs), list(transfers)
        self.predictions = ANY_WORKER if predictions is None else predictions
        self.booked, self.placed, self.submitted, self.counted = [], [], [], []
        self.notes = {}
        self.kv = PlayedHandOver(self)

    async def place(self, request, role, moves_kv=False):
        placement = Placement(self, role, len(self.placed))
        self.booked.append(placement)
        self.placed.append((str(role), moves_kv))
        return placement

    async def run(self, placement, request, sink, hand_over=None):
        self.submitted.append((request, hand_over is not None))
        tokens, end = self.runs.pop(0)
        if tokens:
            sink.cached(8 * len(self.submitted))
            sink.push(tokens, None)
        if isinstance(end, asyncio.Event):
            await end.wait()
            return Finish(FinishReason.LENGTH)
        if isinstance(end, Exception):
            raise end
        return end if isinstance(end, Finish) else Finish(end)

    def hand_over(self, request):
        return self.kv

    def predict(self, request, role):
        return self.predictions.get(role)

    def transfer_ms(self, num_tokens):
        return 5.0

    def count(self, event):
        self.counted.append(event)

    def note(self, request_id, **why):
        self.notes.update(why)

    def stop(self, request_id): ...


class Sink:
    def __init__(self):
        self.tokens, self.cached_tokens = [], []

    def push(self, token_ids, logprobs):
        self.tokens += token_ids

    def cached(self, num_tokens):
        self.cached_tokens.append(num_tokens)


def mode(policy="always"):
    return DisaggregatedMode(ModeConfig(1, 2, 3, policy))


def a_request(max_tokens=10, min_tokens=0):
    return Request(RequestId(1), array("i", PROMPT), SamplingParams(max_tokens, min_tokens=min_tokens))


async def run(cluster, policy="always", **fields):
    sink = Sink()
    finish = await mode(policy).run(a_request(**fields), sink, cluster)
    assert not cluster.booked and not cluster.kv.is_open
    return finish, sink


LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


def test_it_is_a_plugin_with_two_roles():
    made = make_mode("disagg", ModeConfig(1, 2, 3))
    assert made.roles == {Role.PREFILL: 2, Role.DECODE: 3}
    assert make_mode("agg", ModeConfig(1, 2, 3)) is None


async def test_one_worker_begins_and_another_goes_on():
    cluster = PlayedCluster(([7], LENGTH), ([8, 9], STOP))
    finish, sink = await run(cluster, min_tokens=4)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8, 9])
    assert sink.cached_tokens == [8], "what the client is told of is the prefill's"
    (first, keeps), (rest, _) = cluster.submitted
    assert keeps and first.sampling.max_tokens == 1 and list(first.prompt) == PROMPT
    assert list(rest.prompt) == [*PROMPT, 7] and rest.num_resumed == 1
    assert (rest.sampling.max_tokens, rest.sampling.min_tokens) == (9, 3)
    assert cluster.placed == [("prefill", False), ("decode", True)] and cluster.counted == ["remote_prefill"]
    assert cluster.kv.began_on == ["decode-1"]


@pytest.mark.parametrize(("end", "max_tokens"), [(STOP, 10), (LENGTH, 1), (FinishReason.ERROR, 10)])
async def test_an_answer_that_ends_with_its_first_token_is_the_prefills_alone(end, max_tokens):
    cluster = PlayedCluster(([7], end))
    finish, sink = await run(cluster, max_tokens=max_tokens)
    assert (finish.reason, sink.tokens, cluster.placed) == (end, [7], [("prefill", False)])
    assert cluster.submitted[0][1] is (max_tokens > 1), "KV that nobody will ask for is not kept"


async def test_a_long_prompt_is_read_while_it_is_computed():
    computed = asyncio.Event()
    cluster = PlayedCluster(([7], computed), ([8], STOP))
    task = asyncio.create_task(mode().run(a_request(), Sink(), cluster))
    await asyncio.sleep(0)
    cluster.kv.early.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert cluster.kv.began_on == ["decode-1"] and len(cluster.submitted) == 1
    computed.set()
    assert (await task).reason is STOP
    assert len(cluster.placed) == 2 and not cluster.booked


async def test_a_lost_prefill_is_tried_again_elsewhere():
    cluster = PlayedCluster(([], Lost()), ([7], LENGTH), ([8], STOP))
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8])
    assert cluster.counted == ["remote_prefill", "prefill_retried"]
    assert [role for role, _ in cluster.placed] == ["prefill", "prefill", "decode"]


async def test_without_a_prefill_the_decode_worker_computes_the_prompt():
    cluster = PlayedCluster(([], Lost()), ([], Lost()), ([7, 8], STOP))
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8])
    assert cluster.counted == ["remote_prefill", "prefill_retried", "prefill_moved_to_decode"]
    assert cluster.submitted[-1][0].num_resumed == 0 and cluster.kv.began_on == []


@pytest.mark.parametrize("was_ready", [True, False])
async def test_where_no_prefill_worker_is_ready_the_decode_worker_computes_the_prompt(was_ready):
    """It was the only one that died, or there was none from the beginning."""
    cluster = PlayedCluster(*([([], Lost())] if was_ready else []), ([7, 8], STOP))
    answers = iter([ANY_WORKER[Role.PREFILL]] if was_ready else [])
    cluster.predict = lambda request, role: next(answers, None)
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens, cluster.counted) == (STOP, [7, 8], MOVED)
    assert cluster.placed[-1] == ("decode", False)


async def test_a_prefill_lost_after_its_token_is_not_repeated():
    cluster = PlayedCluster(([7], Lost()), ([8], STOP), transfers=[False])
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8])
    assert cluster.counted == ["remote_prefill", "transfer_failed"]


async def test_a_failed_transfer_costs_time_and_nothing_else():
    cluster = PlayedCluster(([7], LENGTH), ([8], STOP), transfers=[False])
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8]) and cluster.counted[-1] == "transfer_failed"


async def test_a_lost_decode_worker_is_replaced_where_it_left_off():
    cluster = PlayedCluster(([7], LENGTH), ([8, 9], Lost()), ([10], STOP), transfers=[True, False])
    finish, sink = await run(cluster)
    assert (finish.reason, sink.tokens) == (STOP, [7, 8, 9, 10])
    last = cluster.submitted[-1][0]
    assert list(last.prompt) == [*PROMPT, 7, 8, 9] and (last.num_resumed, last.sampling.max_tokens) == (3, 7)
    assert "decode_retried" in cluster.counted


async def test_one_that_has_all_its_tokens_needs_no_other_worker():
    cluster = PlayedCluster(([7], LENGTH), ([8, 9], Lost()))
    finish, sink = await run(cluster, max_tokens=3)
    assert (finish.reason, sink.tokens) == (LENGTH, [7, 8, 9])


async def test_two_lost_decode_workers_are_an_error():
    cluster = PlayedCluster(([7], LENGTH), ([], Lost()), ([], Lost()))
    with pytest.raises(Lost):
        await run(cluster)
    assert not cluster.booked and not cluster.kv.is_open
    assert cluster.counted[-2:] == ["decode_retried", "decode_lost"]


@pytest.mark.parametrize("phase", [0, 1])
async def test_cancelling_gives_everything_back(phase):
    never = asyncio.Event()
    runs = [([7], never)] if phase == 0 else [([7], LENGTH), ([8], never)]
    cluster = PlayedCluster(*runs)
    task = asyncio.create_task(mode().run(a_request(), Sink(), cluster))
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(cluster.submitted) == phase + 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not cluster.booked and not cluster.kv.is_open


def predictions(prefill, decode):
    return {Role.PREFILL: Prediction(*prefill), Role.DECODE: Prediction(*decode)}


@pytest.mark.parametrize(
    ("policy", "prefill", "decode", "is_local"),
    [
        ("never", (0, 1, 10, 0), (0, 1000, 10, 9), True),
        ("always", (9999, 1, 10, 0), (0, 1, 10, 0), False),
        ("auto", (0, 100, 900, 0), (0, 100, 900, 0), False),  # a long prompt goes to a prefill worker
        ("auto", (0, 8, 20, 0), (0, 8, 20, 0), True),  # a short one is not worth the transfer
        ("auto", (0, 8, 20, 0), (0, 8, 20, 10), False),  # but ten others would wait for it
        ("auto", (5000, 100, 900, 0), (0, 100, 900, 2), True),  # the prefill pool is busy
        ("auto", (0, 100, 900, 0), (0, 5, 10, 2), True),  # the decode worker has nearly all of it
    ],
)
async def test_where_a_prompt_is_computed(policy, prefill, decode, is_local):
    runs = [([7], STOP)] if is_local else [([7], LENGTH), ([8], STOP)]
    cluster = PlayedCluster(*runs, predictions=predictions(prefill, decode))
    await run(cluster, policy)
    assert cluster.counted == ["local_prefill" if is_local else "remote_prefill"]


async def test_without_prefill_workers_decode_workers_do_it_all():
    cluster = PlayedCluster(([7], STOP), predictions={Role.DECODE: Prediction(0, 100, 900, 0)})
    await run(cluster, "auto")
    assert cluster.counted == ["local_prefill"]


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_handle_goes_with_the_decode_once_and_a_lost_one_costs_a_prefill_there(is_lost):
    lost = Finish(FinishReason.ERROR, error="not there", kv_lost=True)
    ends = [([], lost), ([6, 7], FinishReason.STOP)] if is_lost else [([6, 7], FinishReason.STOP)]
    cluster = PlayedCluster(([5], FinishReason.LENGTH), *ends)
    handle = cluster.kv.handle = KVHandle(3, WorkerId("prefill-0"), 1, 0, (), descriptor=b"there")
    finish, sink = await run(cluster)
    assert finish.reason is FinishReason.STOP and sink.tokens == [5, 6, 7]
    decodes = [request for request, _ in cluster.submitted[1:]]
    assert [request.kv_handle for request in decodes] == ([handle, None] if is_lost else [handle])
    assert all(request.num_resumed == 1 and list(request.prompt) == [*PROMPT, 5] for request in decodes)
    assert cluster.kv.num_taken_back == is_lost and ("transfer_failed" in cluster.counted) is is_lost
    assert cluster.placed == [("prefill", False), ("decode", True)]
