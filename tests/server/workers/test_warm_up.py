"""What a worker does before it is ready: which probes there are, how long they may take, and how they fail."""

import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtserve.plugins.api import EngineConfig, EngineInfo, FinishReason, Output, StepOutputs, WorkerLoad
from trtserve.plugins.driver import Driver
from trtserve.plugins.engines.sim.engine import SimEngine
from trtserve.server.workers.warm_up import (
    CACHE_SALT,
    FIRST_REQUEST_ID,
    Probe,
    WarmUp,
    WarmUpFailed,
    WarmUpWatch,
    first_token,
    probes,
)

INFO = EngineInfo(
    block_size=16, num_blocks=2048, max_num_seqs=256, max_num_tokens=512, max_seq_len=4096, vocab_size=1000
)
SIZES = st.builds(
    EngineInfo,
    block_size=st.integers(1, 64),
    num_blocks=st.integers(2, 3000),
    max_num_seqs=st.integers(1, 300),
    max_num_tokens=st.integers(1, 9000),
    max_seq_len=st.integers(2, 9000),
    vocab_size=st.integers(1, 2000),
)


class Instant:
    """An engine that answers within `submit`; remembers what it was given."""

    def __init__(self, watch, end=FinishReason.LENGTH, on_submit=lambda: None):
        self.requests = []
        self._watch, self._end, self._on_submit = watch, end, on_submit

    def submit(self, request):
        self.requests.append(request)
        self._on_submit()
        output = Output(request.id, (), self._end, error="out of luck" if self._end is FinishReason.ERROR else None)
        self._watch.see(StepOutputs([output], WorkerLoad()))


def run(info=INFO, limit_s=10.0, clock=lambda: 0.0, **behaviour):
    """The requests of a whole warm-up."""
    watch = WarmUpWatch()
    engine = Instant(watch, **behaviour)
    WarmUp(engine, info, watch, limit_s, clock).run()
    return engine.requests


def lengths(requests):
    return [len(request.prompt) for request in requests]


def test_three_prompts_then_two_batches_of_decodes():
    assert first_token(INFO) == Probe(1, 8, 2)
    assert probes(INFO) == [Probe(1, 32, 1), Probe(1, 128, 1), Probe(1, 512, 1), Probe(1, 32, 6), Probe(8, 32, 6)]
    assert lengths(run()) == [8, 32, 128, 512, 32, *[32] * 8]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_num_tokens": 16}, [(1, 8, 1), (1, 16, 1), (1, 8, 6), (8, 8, 6)]),
        ({"max_num_tokens": 8192}, [(1, 512, 1), (1, 2048, 1), (1, 4095, 1), (1, 512, 6), (8, 512, 6)]),
        ({"max_seq_len": 100}, [(1, 32, 1), (1, 99, 1), (1, 32, 6), (8, 32, 6)]),
        ({"num_blocks": 24}, [(1, 32, 1), (1, 128, 1), (1, 383, 1), (1, 32, 6), (6, 32, 6)]),
        ({"max_num_seqs": 3}, [(1, 32, 1), (1, 128, 1), (1, 512, 1), (1, 32, 6), (3, 32, 6)]),
        ({"max_num_seqs": 1}, [(1, 32, 1), (1, 128, 1), (1, 512, 1), (1, 32, 6)]),
        ({"max_seq_len": 4}, [(1, 3, 1)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_small_engines_get_less(changes, expected):
    assert probes(replace(INFO, **changes)) == [Probe(*one) for one in expected]


@given(SIZES)
def test_every_probe_fits(info):
    capacity = info.num_blocks * info.block_size
    for probe in [first_token(info), *probes(info)]:
        length = probe.prompt_tokens + probe.max_tokens
        assert probe.prompt_tokens >= 1 and probe.max_tokens >= 1
        assert length <= info.max_seq_len and probe.prompt_tokens <= info.max_num_tokens
        assert probe.num_sequences <= info.max_num_seqs
        assert probe.num_sequences * -(-length // info.block_size) * info.block_size <= capacity + info.block_size - 1


@given(st.integers(1, 5000))
def test_prompts_are_of_the_vocabulary(vocab_size):
    for request in run(replace(INFO, vocab_size=vocab_size, max_num_tokens=64)):
        assert 0 <= min(request.prompt) and max(request.prompt) < vocab_size
        assert vocab_size < 4 or max(request.prompt) < vocab_size - vocab_size // 4


def test_prompts_differ_from_each_other_and_from_everybody_else_s():
    requests = run()
    assert len({request.prompt[:8].tobytes() for request in requests}) == len(requests)
    assert {request.cache_salt for request in requests} == {CACHE_SALT}
    assert [request.id for request in requests] == list(range(FIRST_REQUEST_ID, FIRST_REQUEST_ID + len(requests)))
    assert all(request.sampling.ignore_eos for request in requests)
    assert requests == run(), "another worker's warm-up is the same"


@pytest.mark.parametrize(("limit_s", "expected"), [(0.0, [8]), (1.0, [8, 32]), (2.5, [8, 32, 128, 512])])
def test_no_probe_starts_once_time_is_over(limit_s, expected):
    """A request takes a second here, and what comes before the first token does not count."""
    now_s = 100.0

    def pass_a_second():
        nonlocal now_s
        now_s += 1.0

    assert lengths(run(limit_s=limit_s, clock=lambda: now_s, on_submit=pass_a_second)) == expected


def test_a_request_that_fails_ends_the_warm_up():
    with pytest.raises(WarmUpFailed, match="the warm-up request failed: out of luck"):
        run(end=FinishReason.ERROR)


def test_only_the_ends_of_its_own_requests_count():
    watch = WarmUpWatch()
    first, second = FIRST_REQUEST_ID, FIRST_REQUEST_ID + 1
    watch.expect([first, second])
    waiting = threading.Thread(target=watch.wait, daemon=True)
    waiting.start()
    ended = [Output(number, (), FinishReason.LENGTH) for number in (7, first)]
    watch.see(StepOutputs([*ended, Output(second, [5])], WorkerLoad()))
    assert watch._open == {second}
    watch.see(StepOutputs([Output(second, (), FinishReason.LENGTH)], WorkerLoad()))
    waiting.join(10)
    assert not waiting.is_alive()


class Recorder:
    """The sink of a real engine: keeps what its passes did."""

    def __init__(self, watch):
        self.watch, self.stats, self.preemptions = watch, [], 0

    def push(self, step):
        if step.stats is not None:
            self.stats.append(step.stats)
        self.preemptions = step.load.preemptions_total
        self.watch.see(step)

    def fail(self, error):
        self.watch.give_up(str(error))

    def progress(self, phase):
        pass


@pytest.mark.parametrize("num_blocks", [2, 24, 2048])
def test_what_the_simulated_engine_shows(num_blocks):
    watch = WarmUpWatch()
    sink = Recorder(watch)
    sim = SimEngine(EngineConfig("", num_blocks=num_blocks), clock=lambda: 0.0, sleep=lambda seconds: None)
    engine = Driver(sim, sim.interrupt)
    info = engine.start(sink)
    WarmUp(engine, info, watch, limit_s=10.0).run()
    engine.close()
    prefills = {stats.prefill_tokens for stats in sink.stats}
    assert prefills >= {probe.prompt_tokens for probe in probes(info) if probe.num_sequences == 1}
    batches = {stats.decode_sequences for stats in sink.stats if not stats.prefill_tokens}
    assert batches >= {probe.num_sequences for probe in probes(info) if probe.max_tokens > 1}
    assert sink.preemptions == 0
    assert sum(stats.duration_s for stats in sink.stats) < 0.4, "simulated seconds"
