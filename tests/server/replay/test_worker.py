"""One worker in virtual time, against times computed by hand from the lengths of its passes."""

import asyncio
from array import array

import pytest

from tests.server.replay.traces import engine
from trtserve.plugins.api import FinishReason, Request, RequestId, RequestRefused, Role, SamplingParams, WorkerId
from trtserve.server.replay.virtual_time import VirtualTimeLoop
from trtserve.server.replay.worker import VirtualWorker

IDLE_S = 1e-6


class Site:
    """A worker, and what it reported: (end of the pass, {request: tokens})."""

    def __init__(self, made) -> None:
        self.timing, self.capacity = made.timing, made.limits.num_blocks * made.limits.block_size
        self.loop = asyncio.get_running_loop()
        self.reports, self.ends = [], {}
        self.worker = VirtualWorker(WorkerId("agg-0"), Role.AGG, made.scheduler(), self.loop, self.report)

    def report(self, worker_id, step, ended_s):
        # Reports come in the order of time, and never of what is not over yet.
        assert not self.reports or self.reports[-1][0] <= ended_s
        assert ended_s <= self.loop.time() + 1e-9
        self.reports.append((ended_s, {output.request_id: len(output.token_ids) for output in step.outputs}))
        for output in step.outputs:
            if output.finish_reason is not None:
                self.ends[output.request_id] = ended_s, output.finish_reason

    def prefill_s(self, tokens):
        return self.timing.prefill_s(tokens)

    def decodes_s(self, context, count, rows=1):
        """Of the next passes with so many sequences that have `context` tokens now."""
        return sum(self.timing.decode_s(context + rows * number, self.capacity) for number in range(count))


def on_a_worker(main, **sizes):
    async def with_site():
        await main(Site(engine(**sizes)))

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(with_site())


def request(number, length, max_tokens):
    prompt = array("i", [-1 - number]) * length
    return Request(RequestId(number), prompt, SamplingParams(max_tokens, ignore_eos=True))


def test_a_request_alone():
    async def main(site):
        site.worker.submit(request(1, 20, 100))
        await asyncio.sleep(60)
        first_s = IDLE_S + site.prefill_s(20)
        assert site.reports[0] == (pytest.approx(first_s), {1: 1})
        assert site.ends == {1: (pytest.approx(first_s + site.decodes_s(21, 99)), FinishReason.LENGTH)}
        assert sum(given[1] for _, given in site.reports) == 100
        # Not one report a pass: those that begin or end a block are alone, the others together.
        assert len(site.reports) < 25

    on_a_worker(main)


def test_requests_of_one_instant_share_the_first_pass():
    async def main(site):
        for number in (1, 2):
            site.worker.submit(request(number, 20, 1))
            await asyncio.sleep(0)
        await asyncio.sleep(1)
        assert site.reports == [(pytest.approx(IDLE_S + site.prefill_s(40)), {1: 1, 2: 1})]

    on_a_worker(main)


def test_a_request_waits_for_the_decode_under_way():
    async def main(site):
        site.worker.submit(request(1, 17, 100))
        first_s = IDLE_S + site.prefill_s(17)
        # Five decodes have ended, the sixth is under way.
        cut_s = first_s + site.decodes_s(18, 5) + 0.001
        await asyncio.sleep(cut_s)
        site.worker.submit(request(2, 40, 1))
        assert site.reports[1:] == [(pytest.approx(first_s + site.decodes_s(18, 5)), {1: 5})]
        await asyncio.sleep(60)
        sixth_s = first_s + site.decodes_s(18, 6)
        assert site.reports[2] == (pytest.approx(sixth_s), {1: 1})
        joint_s = site.prefill_s(40) + site.decodes_s(24, 1)
        assert site.reports[3] == (pytest.approx(sixth_s + joint_s), {1: 1, 2: 1})
        assert site.ends[1][0] == pytest.approx(sixth_s + joint_s + site.decodes_s(25, 92))

    on_a_worker(main)


def test_settling_tells_what_is_over_and_changes_nothing():
    ends = []

    async def main(site, looks=()):
        site.worker.submit(request(1, 20, 60))
        site.worker.submit(request(2, 33, 40))
        for look_s in looks:
            await asyncio.sleep(look_s - site.loop.time())
            site.worker.settle()
            reported = [ended_s for ended_s, _ in site.reports]
            begun_s = reported[-1] if reported else 0.0
            # The next pass is not over: nothing that is was left out.
            assert look_s - begun_s < site.prefill_s(53) + site.decodes_s(200, 1)
            site.worker.settle()
            assert [ended_s for ended_s, _ in site.reports] == reported
        await asyncio.sleep(60)
        ends.append(site.ends)
        assert sum(given.get(1, 0) for _, given in site.reports) == 60

    on_a_worker(main)
    on_a_worker(lambda site: main(site, [0.01, 0.05, 0.1, 0.1, 0.1007, 0.2, 0.3]))
    assert ends[0] == ends[1]


def test_a_cancelled_request_ends_with_the_pass_under_way():
    async def main(site):
        site.worker.submit(request(1, 17, 100))
        first_s = IDLE_S + site.prefill_s(17)
        await asyncio.sleep(first_s + 0.001)
        site.worker.cancel(RequestId(1))
        site.worker.cancel(RequestId(77))
        await asyncio.sleep(60)
        assert site.ends == {1: (pytest.approx(first_s + site.decodes_s(18, 1)), FinishReason.CANCELLED)}
        site.worker.submit(request(2, 17, 1))
        submitted_s = site.loop.time()
        await asyncio.sleep(60)
        assert site.ends[2] == (pytest.approx(submitted_s + IDLE_S + site.prefill_s(17)), FinishReason.LENGTH)

    on_a_worker(main)


def test_a_request_cancelled_before_its_pass():
    async def main(site):
        site.worker.submit(request(1, 17, 100))
        site.worker.cancel(RequestId(1))
        await asyncio.sleep(1)
        assert site.ends == {1: (pytest.approx(IDLE_S), FinishReason.CANCELLED)}

    on_a_worker(main)


def test_what_can_never_run_is_refused():
    async def main(site):
        with pytest.raises(RequestRefused, match="has 32 tokens; this engine takes 1 to 31"):
            site.worker.submit(request(1, 32, 1))
        await asyncio.sleep(1)
        assert site.reports == []

    on_a_worker(main, num_blocks=2)
