"""Makes passes last as long as they should in real time."""

from __future__ import annotations

from collections.abc import Callable

# A wait this short costs more than it waits; sleeping is no finer than about this anywhere.
SHORTEST_WAIT_S = 50e-6

# How late a wait may end and still be made up for by the next pass. More is an idle time between two passes.
LONGEST_LATENESS_S = 1e-3


class Pacer:
    """Waits out the rest of each pass. `scale`: real seconds for one simulated second.

    A wait that ended a little late shortens the next pass, so that errors of the clock do not add up.
    """

    def __init__(self, scale: float, clock: Callable[[], float], sleep: Callable[[float], object]) -> None:
        self._scale = scale
        self._clock = clock
        self._sleep = sleep
        self._due_s = float("-inf")  # when the last pass should have ended

    def begin(self) -> float:
        """When the pass that starts now counts as begun, by the clock."""
        now_s = self._clock()
        return self._due_s if 0 <= now_s - self._due_s < LONGEST_LATENESS_S else now_s

    def finish(self, began_s: float, simulated_s: float) -> float:
        """Wait until the pass is over; returns the seconds it took, more than planned where computing took longer."""
        planned_s = simulated_s * self._scale
        elapsed_s = self._clock() - began_s
        duration_s = max(planned_s, elapsed_s)
        self._due_s = began_s + duration_s
        if planned_s >= SHORTEST_WAIT_S and planned_s - elapsed_s > 0:
            self._sleep(planned_s - elapsed_s)
        return duration_s
