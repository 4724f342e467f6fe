"""A circuit breaker: after a few failures in a row no request is made, until a probe succeeds.

closed -> open after `failures` in a row, or at once on `trip`. open -> half_open when its wait is over: one probe, made
in the background, decides. Each time it opens again before anything has worked, it waits twice as long, with jitter so
that servers do not probe together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

CLOSED, HALF_OPEN, OPEN = "closed", "half_open", "open"
JITTER = 0.2


class Breaker:
    """Says whether to ask. One thread."""

    def __init__(
        self,
        changed: Callable[[str], None] | None = None,
        *,
        failures: int = 3,
        min_wait_s: float = 1.0,
        max_wait_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.state = CLOSED
        self._changed, self._failures, self._min_wait_s, self._max_wait_s = changed, failures, min_wait_s, max_wait_s
        self._clock, self._chance = clock, chance
        self._in_a_row = 0
        self._backoff_s = min_wait_s
        self._probe_at = 0.0
        if changed:
            changed(CLOSED)

    def success(self) -> None:
        """Something that was asked for worked: failures before it are forgotten, and so are earlier waits."""
        if self.state == CLOSED:
            self._in_a_row = 0
            self._backoff_s = self._min_wait_s

    def failure(self) -> None:
        """Something failed or took too long."""
        self._in_a_row += 1
        if self.state == CLOSED and self._in_a_row >= self._failures:
            self.trip()

    def trip(self) -> None:
        """Open now, whatever went before."""
        if self.state == OPEN:
            return
        self._probe_at = self._clock() + self._backoff_s * (1 + JITTER * (2 * self._chance() - 1))
        self._backoff_s = min(2 * self._backoff_s, self._max_wait_s)
        self._become(OPEN)

    def wait_s(self) -> float:
        """Seconds until the next probe may be made; 0 when it may be made now."""
        return max(0.0, self._probe_at - self._clock())

    def begin_probe(self) -> None:
        """The probe is on its way."""
        self._become(HALF_OPEN)

    def end_probe(self, worked: bool) -> None:
        """What the probe found. A probe that worked closes the breaker; only real work resets the wait."""
        if worked:
            self._in_a_row = 0
            self._become(CLOSED)
        else:
            self.trip()

    def _become(self, state: str) -> None:
        if state != self.state:
            self.state = state
            if self._changed:
                self._changed(state)
