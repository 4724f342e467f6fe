"""Zipf's law over a finite number of ranks, sampled exactly in memory that does not grow with it."""

# Shapes: B ranks.

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Int64s = NDArray[np.int64]


class Zipf:
    """Ranks from 0 up, the k-th with probability ~ (k + 1) ** -exponent; any exponent from 0 (uniform) up.

    Rejection-inversion (Hörmann and Derflinger, 1996): ranks are drawn from a density above the law, whose integral
    has an inverse, and the few that lie above the law are drawn again.
    """

    def __init__(self, num_ranks: int, exponent: float) -> None:
        self.num_ranks, self.exponent = num_ranks, exponent
        self._begin = float(self._integral(np.array([1.5]))[0]) - 1.0
        self._end = float(self._integral(np.array([num_ranks + 0.5]))[0])
        second = self._integral(np.array([2.5])) - 2.0**-exponent
        self._squeeze = 2.0 - float(self._inverse(second)[0])
        """Ranks so close above their draw are under the law for sure."""

    def draw(self, count: int, rng: np.random.Generator) -> Int64s:
        """The next `count` ranks, int64 [B]."""
        ranks_B = np.empty(count, np.int64)
        drawn = 0
        while drawn < count:
            accepted = self._try(count - drawn, rng)
            ranks_B[drawn : drawn + len(accepted)] = accepted
            drawn += len(accepted)
        return ranks_B

    def _try(self, count: int, rng: np.random.Generator) -> Int64s:
        """At most `count` ranks."""
        u = self._end + rng.random(count) * (self._begin - self._end)
        x = self._inverse(u)
        ranks = np.clip(np.floor(x + 0.5), 1, self.num_ranks)
        good = ranks - x <= self._squeeze
        (unsure,) = np.nonzero(~good)
        law = ranks[unsure] ** -self.exponent
        good[unsure] = u[unsure] >= self._integral(ranks[unsure] + 0.5) - law
        return ranks[good].astype(np.int64) - 1

    def _integral(self, x: Floats) -> Floats:
        """Of t ** -exponent from 1 to x; smooth where the exponent passes 1."""
        log = np.log(x)
        return log * _ratio(np.expm1, (1.0 - self.exponent) * log)

    def _inverse(self, area: Floats) -> Floats:
        """The x up to which the integral is `area`."""
        scaled = np.maximum(area * (1.0 - self.exponent), -1.0 + 1e-15)
        return np.exp(area * _ratio(np.log1p, scaled))


def _ratio(function: Callable[[Floats], Floats], x: Floats) -> Floats:
    """function(x) / x, and its limit 1 (to first order) where x is nearly 0."""
    small = np.abs(x) < 1e-12
    return np.where(small, 1.0, function(x) / np.where(small, 1.0, x))
