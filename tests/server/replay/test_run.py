"""Whole replays: against a model that runs every pass by itself, and what the router gets to see."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.server.replay.traces import BLOCK, conversations, engine, entry, options
from trtserve.plugins.api import Finish, FinishReason, Request, RequestId, Role, SamplingParams
from trtserve.plugins.routing_api import Assignment, Plan
from trtserve.server.replay.run import replay
from trtserve.server.replay.trace import TraceError
from trtserve.server.replay.virtual_time import Deadlock

IDLE_S = 1e-6


@dataclass
class Outcome:
    first_s: float = 0.0
    ended_s: float = 0.0
    cached: int = 0


def naive(trace, workers, speedup=1.0):
    """Round robin on engines whose passes are run one by one, each worker on its own."""
    outcomes = [Outcome() for _ in trace]
    for worker in range(workers):
        queue = [(request.arrival_ms / 1000 / speedup, request) for request in trace[worker::workers]]
        scheduler, now_s = engine().scheduler(), 0.0
        while queue or scheduler.has_work():
            if not scheduler.has_work():
                now_s = max(now_s, queue[0][0] + IDLE_S)
            while queue and queue[0][0] < now_s:
                _, request = queue.pop(0)
                sampling = SamplingParams(request.output_tokens, ignore_eos=True)
                scheduler.add(Request(RequestId(request.number), request.prompt(BLOCK), sampling))
            step = scheduler.run_pass()
            now_s += step.stats.duration_s
            for output in step.outputs:
                outcome = outcomes[output.request_id]
                if output.cached_tokens is not None:
                    outcome.first_s, outcome.cached = now_s, output.cached_tokens
                outcome.ended_s = now_s
    return outcomes


@pytest.mark.parametrize(("workers", "every_ms", "speedup"), [(1, 60.0, 1.0), (3, 15.0, 1.0), (3, 40.0, 4.0)])
def test_round_robin_is_what_engines_do_pass_by_pass(workers, every_ms, speedup):
    trace = conversations(150, every_ms=every_ms)
    result = replay(trace, options("round_robin", workers, speedup=speedup))
    expected = naive(trace, workers, speedup)
    arrivals_s = [request.arrival_ms / 1000 / speedup for request in trace]
    ttft_ms = [(one.first_s - arrival_s) * 1000 for one, arrival_s in zip(expected, arrivals_s, strict=True)]
    e2e_ms = [(one.ended_s - arrival_s) * 1000 for one, arrival_s in zip(expected, arrivals_s, strict=True)]
    assert result.ttft.mean == pytest.approx(sum(ttft_ms) / 150, abs=1e-6)
    assert result.ttft.max == pytest.approx(max(ttft_ms), abs=1e-6)
    assert result.e2e.mean == pytest.approx(sum(e2e_ms) / 150, abs=1e-6)
    assert result.e2e.max == pytest.approx(max(e2e_ms), abs=1e-6)
    gaps = sum(request.output_tokens - 1 for request in trace)
    assert result.itl_mean_ms == pytest.approx((sum(e2e_ms) - sum(ttft_ms)) / gaps, abs=1e-6)
    assert 0 < sum(one.cached for one in expected)
    assert result.hit_rate == sum(one.cached for one in expected) / sum(request.input_tokens for request in trace)
    assert (result.held_share, result.hold_ms_mean) == (0.0, 0.0)
    assert result.assignments == [
        (number % workers, pytest.approx(arrival_s * 1000, abs=2e-6)) for number, arrival_s in enumerate(arrivals_s)
    ]


def without_real_time(result):
    return {name: value for name, value in result.summary().items() if name != "decision_us_mean"}, result.assignments


@pytest.mark.parametrize("lag_s", [0.0, 0.05])
def test_two_runs_are_equal_and_prefixes_are_found(lag_s):
    trace = conversations(120, every_ms=25.0)
    kv, again = (replay(trace, options("kv", 3, event_lag_s=lag_s)) for _ in range(2))
    assert without_real_time(kv) == without_real_time(again)
    assert kv.hit_rate > replay(trace, options("round_robin", 3)).hit_rate
    assert kv.held_share > 0
    assert kv.hold_ms_mean > 0


def test_the_order_of_the_file_is_kept_whatever_the_times():
    trace = [entry(0, 5000.0, [1]), entry(1, 4000.0, [2]), entry(2, 4000.0, [3])]
    result = replay(trace, options("round_robin", 3))
    # From the earliest request on, whose worker comes first.
    assert result.assignments == [(2, 1000.0), (0, 0.0), (1, 0.0)]


def test_progress_counts_every_request():
    told = []
    replay(conversations(10), options(), told.append)
    assert sum(told) == 10


# ------------------------------------------------------------------ what the router sees


@dataclass
class Watching:
    """Everything to the first worker; remembers what it saw."""

    uses_prefixes: bool = True
    looks: list = field(default_factory=list)

    def assign(self, held, state):
        view = state.workers[0]
        for waiting in held:
            seen = (
                view.context_tokens,
                view.decoding,
                view.load.generated_tokens_total,
                (view.pass_ends_s - state.now_s),
            )
            self.looks.append((waiting, waiting.overlaps().get(view.slot, 0), seen))
        return Plan([Assignment(waiting.request.id, view.worker_id) for waiting in held])


def test_a_decision_sees_the_passes_that_are_over_by_then():
    made = engine()
    timing, capacity = made.timing, made.limits.num_blocks * BLOCK
    first = entry(0, 0.0, [1], output_tokens=300, rest=1)
    ends_s = [IDLE_S + timing.prefill_s(17)]
    for number in range(100):
        ends_s.append(ends_s[-1] + timing.decode_s(18 + number, capacity))
    for number in (0, 7, 8, 60):
        watching, moment_s = Watching(), (ends_s[number] + ends_s[number + 1]) / 2
        trace = [first, entry(1, moment_s * 1000, [9])]
        replay(trace, options(watching, 1))
        _, overlap, (context_tokens, decoding, generated, ends_in_s) = watching.looks[1]
        assert (context_tokens, decoding, generated) == (17 + 1 + number, 1, 1 + number)
        assert overlap == 0
        # The pass under way began when the last one ended, not when somebody looked.
        assert 0 < ends_in_s < ends_s[number + 1] - ends_s[number]


def test_the_router_is_not_told_how_long_an_answer_is():
    watching = Watching()
    trace = [entry(0, 0.0, [1], output_tokens=7), entry(1, 0.0, list(range(390)), output_tokens=7)]
    replay(trace, options(watching, 1, max_tokens=1000))
    assert [waiting.request.sampling.max_tokens for waiting, *_ in watching.looks] == [1000, 400 * 16 - 390 * 16 - 3]
    assert [len(waiting.request.block_hashes) for waiting, *_ in watching.looks] == [1, 390]


@pytest.mark.parametrize(("lag_s", "overlap"), [(0.0, 3), (0.5, 3), (5.0, 0)])
def test_the_lag_of_events(lag_s, overlap):
    watching = Watching()
    trace = [entry(0, 0.0, [1, 2, 3]), entry(1, 2000.0, [1, 2, 3, 4])]
    replay(trace, options(watching, 1, event_lag_s=lag_s))
    # The first one has ended by then, and with it the promise of its blocks: only the events tell.
    assert watching.looks[1][1] == overlap


def test_without_prefixes_nothing_is_hashed():
    watching = Watching(uses_prefixes=False)
    replay([entry(0, 0.0, [1, 2])], options(watching, 1))
    assert watching.looks[0][0].request.block_hashes == ()


# ------------------------------------------------------------------ what cannot be replayed


@pytest.mark.parametrize(
    ("bad", "others", "problem"),
    [
        (entry(1, 0.0, list(range(400))), {}, "line 2 of the trace needs 6407 tokens, and a worker holds 6400: raise"),
        (entry(1, 0.0, [1], 9), {"max_tokens": 8}, "line 2 of the trace generates 9 tokens, but requests ask for 8"),
        (entry(1, 1e12, [1]), {}, "the trace lasts 1000000000 s; 500000 s is the most"),
    ],
)
def test_requests_that_no_worker_could_serve(bad, others, problem):
    with pytest.raises(TraceError, match=problem):
        replay([entry(0, 0.0, [1]), bad], options(**others))


class Forgetful:
    uses_prefixes = False

    def assign(self, held, state):
        return Plan([])


def test_a_policy_that_forgets_a_request():
    with pytest.raises(Deadlock):
        replay([entry(0, 0.0, [1])], options(Forgetful()))


@dataclass
class OddMode:
    """Fails, or does things that the shipped modes do not."""

    what: str
    roles: Mapping = field(default_factory=lambda: {Role.AGG: 1})
    ends: list = field(default_factory=list)

    async def run(self, request, sink, cluster):
        if self.what == "error":
            return Finish(FinishReason.ERROR, error="no luck")
        with await cluster.place(request, Role.AGG) as placement:
            run = asyncio.ensure_future(cluster.run(placement, request, sink))
            await asyncio.sleep(0.1)
            if self.what == "stop":
                cluster.stop(request.id)
                self.ends.append((await run).reason)
            else:
                run.cancel()
                await asyncio.wait([run])
                self.ends.append(run.cancelled())
        return Finish(FinishReason.STOP)


def test_a_request_that_fails_is_an_error():
    with pytest.raises(TraceError, match="line 1 of the trace failed: no luck"):
        replay([entry(0, 0.0, [1])], options(mode=OddMode("error")))


@pytest.mark.parametrize(("what", "end"), [("stop", FinishReason.STOP), ("cancel", True)])
def test_a_mode_may_end_a_request_early(what, end):
    mode = OddMode(what)
    trace = [entry(0, 0.0, [1], 500), entry(1, 1000.0, [1], 500)]
    result = replay(trace, options(mode=mode))
    assert mode.ends == [end, end]
    # Cut off after a tenth of a second and a pass, and nothing is left that would slow the next one down.
    assert result.e2e.max < 110
    assert result.itl_mean_ms == pytest.approx(6, rel=0.1)


def test_speculation_ends_sooner():
    trace = conversations(20)
    plain = replay(trace, options())
    drafting = replay(trace, options(engine=lambda: engine(options={"num_draft_tokens": 3, "acceptance_rate": 0.8})))
    assert drafting.e2e.mean < plain.e2e.mean


def test_a_faster_engine_is_in_proportion():
    trace = [entry(0, 0.0, [1, 2, 3], 30)]
    plain = replay(trace, options())
    faster = replay(trace, options(engine=lambda: engine(options={"speedup": 4.0, "slow_factor": 2.0})))
    assert faster.e2e.mean - IDLE_S * 1000 == pytest.approx((plain.e2e.mean - IDLE_S * 1000) / 2)
