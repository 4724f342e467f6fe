"""Clocks that jump and processes that are held up, noticed from inside."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_SECONDS = 0.1
JUMP_NS = 200_000_000
"""More than this between two clocks in one step is no drift."""
PAUSE_NS = 1_000_000_000


class ClockWatch:
    """Looks at both clocks whenever it is told to, which should be every `EVERY_SECONDS`.

    jumps: how often the clock on the wall was set; longest: the longest time in nanoseconds between two looks.
    """

    def __init__(
        self, wall: Callable[[], int] = time.time_ns, steady: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self.wall, self.steady = wall, steady
        self.last = wall(), steady()
        self.jumps = self.longest = 0

    def restart(self) -> None:
        """Forget the time since the last look."""
        self.last = self.wall(), self.steady()

    def look(self) -> None:
        """Compare with the last time."""
        (wall, steady), self.last = self.last, (self.wall(), self.steady())
        passed = self.last[1] - steady
        self.longest = max(self.longest, passed)
        if abs(self.last[0] - wall - passed) > JUMP_NS:
            self.jumps += 1

    @property
    def paused(self) -> float:
        """Seconds of the longest time that this process was held up; 0 where none exceeds PAUSE_NS."""
        return self.longest / 1e9 if self.longest > PAUSE_NS else 0.0
