"""How long attempts took lately: the percentile after which a hedge is worth its cost."""

from __future__ import annotations

import math

WINDOW = 512
REFRESH = 32
"""The percentile is worked out anew after so many: sorting the window for each would cost more than it tells."""


class RecentLatencies:
    """The last `WINDOW` latencies and one percentile of them."""

    def __init__(self, percentile: float, min_samples: int) -> None:
        self._share = percentile / 100.0
        self._min_samples = min_samples
        self._window: list[float] = []
        self._count = 0
        self._worked_out: float | None = None

    def add(self, seconds: float) -> None:
        """Remember one latency, forgetting the oldest."""
        if len(self._window) < WINDOW:
            self._window.append(seconds)
        else:
            self._window[self._count % WINDOW] = seconds
        self._count += 1
        if self._count == self._min_samples or (self._count > self._min_samples and self._count % REFRESH == 0):
            ordered = sorted(self._window)
            self._worked_out = ordered[max(math.ceil(self._share * len(ordered)) - 1, 0)]

    def percentile(self) -> float | None:
        """The percentile (nearest rank), None before `min_samples` are known."""
        return self._worked_out
