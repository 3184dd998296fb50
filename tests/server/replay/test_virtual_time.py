import asyncio
import time

import pytest

from trtserve.server.replay.virtual_time import LONGEST_S, Deadlock, ReportClock, VirtualTimeLoop


def run(main):
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def test_an_hour_passes_at_once():
    async def main():
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began_s = time.monotonic()
    assert run(main()) == pytest.approx(3600)
    assert time.monotonic() - began_s < 60


def test_what_waits_less_comes_first_and_sees_its_own_time():
    seen = []

    async def wait(delay_s):
        await asyncio.sleep(delay_s)
        seen.append((delay_s, asyncio.get_running_loop().time()))

    async def main():
        await asyncio.gather(*(wait(delay_s) for delay_s in (5.0, 0.25, 1e-7, 0.5)))

    run(main())
    assert [delay_s for delay_s, _ in seen] == [1e-7, 0.25, 0.5, 5.0]
    assert [now_s for _, now_s in seen] == pytest.approx([1e-7, 0.25, 0.5, 5.0], rel=1e-12)


def test_time_stands_still_while_there_is_something_to_do():
    async def main():
        loop = asyncio.get_running_loop()
        later = loop.create_task(asyncio.sleep(1e-6))
        for _ in range(100):
            await asyncio.sleep(0)
        assert loop.time() == 0.0
        await later
        assert loop.time() == pytest.approx(1e-6)

    run(main())


def test_timers_of_an_instant_come_before_the_tasks_it_wakes():
    seen = []

    async def main():
        loop = asyncio.get_running_loop()
        reached = loop.create_future()
        loop.call_at(2.0, reached.set_result, None)
        loop.call_at(2.0, seen.append, "timer")
        await reached
        seen.append("task")

    run(main())
    assert seen == ["timer", "task"]


@pytest.mark.parametrize("now_s", [0.1, 3537.123, LONGEST_S])
def test_the_shortest_waits_are_over_however_late_it_is(now_s):
    async def main():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(now_s)
        for delay_s in (5e-324, 1e-15, 1e-9, 2e-9):
            before_s = loop.time()
            await asyncio.sleep(delay_s)
            assert before_s <= loop.time() <= before_s + 1e-8

    run(main())


def test_a_wait_without_an_end_is_an_error():
    released = []

    async def main():
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            released.append(True)

    with pytest.raises(Deadlock, match=r"at 0.000000 s of virtual time every task waits"):
        run(main())
    assert released == [True]


def test_a_deadline_within_virtual_time():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.get_running_loop().create_future()
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(30)


def test_a_report_has_the_time_when_it_happened():
    async def main():
        loop = asyncio.get_running_loop()
        clock = ReportClock(loop)
        await asyncio.sleep(3)
        with clock.at(1.5):
            assert clock() == 1.5
            with clock.at(2.5):
                assert clock() == 2.5
            assert clock() == 1.5
        assert clock() == loop.time()

    run(main())
