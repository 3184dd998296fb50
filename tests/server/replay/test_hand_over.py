"""Disaggregated modes in virtual time: what moves, how long it takes, and what the caches have afterwards."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.replay.traces import BLOCK, conversations, engine, entry, options
from trtserve.plugins.api import ModeConfig, Role, WorkerId
from trtserve.plugins.manager import PluginManager
from trtserve.plugins.routing_api import PolicyConfig
from trtserve.server.replay.hand_over import Links, TransferModel
from trtserve.server.replay.run import replay

MODEL = TransferModel(bytes_per_s=1e6, latency_s=0.5, bytes_per_token=100.0)


def disagg(prefill=1, decode=1, policy="always", **others):
    mode = PluginManager().make_mode("disagg", ModeConfig(1, prefill, decode, policy))
    return options("kv", mode=mode, **others)


def test_a_pair_moves_one_thing_after_another_and_pairs_do_not_wait_for_each_other():
    links = Links(MODEL)
    p, d, e = map(WorkerId, "pde")
    assert links.move(p, d, 10_000, now_s=1.0) == pytest.approx(2.5)
    assert links.move(p, d, 10_000, now_s=1.5) == pytest.approx(4.0)
    assert links.move(p, e, 10_000, now_s=1.5) == pytest.approx(3.0)
    assert links.moved_tokens == 30_000


def test_one_prompt_moves_its_full_blocks_and_its_second_token_waits_for_them():
    trace = [entry(0, 0.0, [1, 2, 3], output_tokens=3)]
    fast, slow = (replay(trace, disagg(transfer=TransferModel(1e9, latency_s, 1000.0))) for latency_s in (0.0, 0.7))
    assert fast.moves.moved_gb == slow.moves.moved_gb == 3 * BLOCK * 1000 / 1e9
    assert fast.ttft == slow.ttft, "the first token is the prefill worker's"
    assert slow.e2e.mean - fast.e2e.mean == pytest.approx(700, abs=0.01)
    assert fast.moves.local_share == 0


def test_the_decode_worker_reads_only_what_it_lacks():
    trace = [entry(0, 0.0, [1, 2, 3]), entry(1, 60_000.0, [1, 2, 3, 4])]
    assert replay(trace, disagg()).moves.moved_gb == pytest.approx(4 * BLOCK * 131_072 / 1e9)


PROMPTS = st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=6), st.integers(1, 4)), min_size=1, max_size=8)


@given(PROMPTS)
@settings(max_examples=40, deadline=None)
def test_what_moves_is_what_the_decode_worker_lacked(prompts):
    """Prompts one after the other: each beginning that a prompt has and no earlier one had moves once."""
    trace = [entry(n, n * 60_000.0, blocks, output_tokens) for n, (blocks, output_tokens) in enumerate(prompts)]
    moved = {tuple(blocks[:end]) for blocks, count in prompts if count > 1 for end in range(1, len(blocks) + 1)}
    result = replay(trace, disagg(transfer=TransferModel(bytes_per_token=1e6)))
    assert result.moves.moved_gb == pytest.approx(len(moved) * BLOCK * 1e6 / 1e9)


class Watched:
    """A policy, every view of a worker that it was shown, and what the last decision saw queued.

    Queues are estimated when a decision asks, so a view that is kept knows them as they were then."""

    uses_prefixes = True

    def __init__(self, name):
        self._policy = PluginManager().make_policy(name, PolicyConfig())
        self.views = {}
        self.queued_at_last = []

    def assign(self, held, state):
        self.queued_at_last = [view.queued_tokens for view in state.workers]
        self.views.update((view.worker_id, view) for view in state.workers)
        return self._policy.assign(held, state)


@given(st.integers(0, 1000), st.sampled_from(["always", "never", "auto"]), st.sampled_from(["kv", "kv_arrival"]))
@settings(max_examples=15, deadline=None)
def test_nothing_stays_booked(seed, disagg_policy, name):
    watched = Watched(name)
    mode = PluginManager().make_mode("disagg", ModeConfig(1, 2, 2, disagg_policy))
    long_after = entry(40, 3_600_000.0, [999_999])
    replay([*conversations(40, seed), long_after], options(watched, mode=mode))
    roles = {view.role for view in watched.views.values()}
    assert roles == ({Role.DECODE} if disagg_policy == "never" else roles | {Role.DECODE})
    for view in watched.views.values():
        assert (view.booked_requests, view.booked_tokens, view.decoding) == (0, 0, 0)
    assert watched.queued_at_last and not any(watched.queued_at_last)


def test_reading_hides_behind_a_prompt_of_several_passes():
    blocks = list(range(1, 41))  # 640 tokens: five passes of 128
    model = TransferModel(1e6, 0.0, 1.0)
    long = replay([entry(0, 0.0, blocks, 2, rest=0)], disagg(transfer=model))
    free = replay([entry(0, 0.0, blocks, 2, rest=0)], disagg(transfer=TransferModel(1e12, 0.0, 1.0)))
    added_ms = long.e2e.mean - free.e2e.mean
    assert 0 < added_ms < 0.3 * 1000 * 640 / 1e6, "what is left after the last pass: a fifth"


def test_a_request_of_one_token_needs_no_decode_worker():
    result = replay([entry(0, 0.0, [1, 2], output_tokens=1)], disagg())
    assert (result.moves.moved_gb, result.e2e.mean) == (0.0, result.ttft.mean)


@pytest.mark.parametrize("policy", ["always", "never", "auto"])
def test_every_request_is_answered_and_two_runs_are_equal(policy):
    trace = conversations(120, every_ms=30.0)
    first, again = (replay(trace, disagg(2, 2, policy, event_lag_s=0.01)) for _ in range(2))
    assert first.assignments == again.assignments and first.e2e == again.e2e and first.moves == again.moves
    assert first.moves.local_share == {"always": 0.0, "never": 1.0}.get(policy, first.moves.local_share)
    gaps = sum(request.output_tokens - 1 for request in trace)
    assert first.requests == 120 and gaps > 0 and first.itl_mean_ms > 0
    assert (first.moves.moved_gb > 0) == (policy != "never" and first.moves.local_share < 1)


def test_long_prompts_hold_up_no_tokens_of_others():
    """Decodes beside prompts of many passes: disaggregated, their tokens keep coming."""
    decodes = [entry(number, 0.0, [100 + number], 400) for number in range(8)]
    prompts = [entry(8 + n, 200.0 + 400 * n, range(1000 * n + 1, 1000 * n + 200), 2) for n in range(6)]
    large = partial(engine, num_blocks=2000, budget=2048)
    together = replay([*decodes, *prompts], options("kv", workers=2, engine=large))
    apart = replay([*decodes, *prompts], disagg(engine=large))
    assert apart.itl_p99_ms < together.itl_p99_ms
