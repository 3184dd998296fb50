"""Idle connections close in time, however often they were busy before; in virtual time."""

import heapq
from itertools import count

import pytest

from trtserve.server.idle import IdleTimers


class Loop:
    """What an IdleTimer needs of an event loop."""

    def __init__(self):
        self.now_s, self._calls, self._number = 100.0, [], count()

    def time(self):
        return self.now_s

    def call_at(self, when_s, callback, *arguments):
        heapq.heappush(self._calls, (when_s, next(self._number), callback, arguments))
        return self._calls[-1]

    def call_soon(self, callback):
        self.call_at(self.now_s, callback)

    def run_until(self, end_s):
        while self._calls and self._calls[0][0] <= end_s:
            self.now_s, _, callback, arguments = heapq.heappop(self._calls)
            callback(*arguments)
        self.now_s = end_s

    @property
    def num_timers(self):
        return len(self._calls)


class Server:
    """hypercorn's TCPServer, as far as it goes."""

    def __init__(self, loop):
        self.loop, self.closed_at_s, self.writer = loop, None, self

    def close(self):
        assert self.closed_at_s is None, "once"
        self.closed_at_s = self.loop.now_s

    async def _idle_timeout(self):
        raise AssertionError("the timer stands in for it")


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def server(loop):
    return Server(loop)


async def test_the_time_counts_from_the_last_answer(loop, server):
    timer = IdleTimers(10).new()
    for second in range(100, 160, 3):
        loop.run_until(second)
        await timer.restart(None, server._idle_timeout)
        loop.run_until(second + 1)
        assert loop.num_timers == 1, "one for them all"
        await timer.stop()
    await timer.restart(None, server._idle_timeout)  # at 158
    loop.run_until(200)
    assert server.closed_at_s == 168 and not loop.num_timers


async def test_a_connection_that_is_busy_or_gone_is_left_alone(loop, server):
    timers = IdleTimers(10)
    timer = timers.new()
    await timer.restart(None, server._idle_timeout)
    await timer.stop()
    loop.run_until(200)
    timers.close_all()
    assert server.closed_at_s is None and not loop.num_timers
    await timer.stop()  # hypercorn does it again when the connection ends


async def test_at_the_end_idle_ones_close_now_and_busy_ones_when_they_become_idle(loop, server):
    timers, other = IdleTimers(10), Server(loop)
    idle, busy = timers.new(), timers.new()
    await idle.restart(None, server._idle_timeout)
    await busy.restart(None, other._idle_timeout)
    await busy.stop()
    timers.close_all()
    assert (server.closed_at_s, other.closed_at_s) == (100, None)
    loop.run_until(101)
    await busy.restart(None, other._idle_timeout)
    loop.run_until(101)
    assert other.closed_at_s == 101
    loop.run_until(200)  # what is left of timers does nothing
