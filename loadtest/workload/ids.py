"""Ids as production requests them: long-tailed, even, or a hot set that moves. The same for the same seed."""

# Shapes: B ids.

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import IdDistribution
from loadtest.workload.permutation import Permutation
from loadtest.workload.recording import dense, read_different, read_ids

Ids = NDArray[Any]
"""int64, or strings as objects."""


class IdStream(Protocol):
    """Ids without an end."""

    def draw(self, count: int, second: float) -> Ids:
        """The next ids [count], for a request `second` seconds after the measurement began."""


def id_stream(
    distribution: IdDistribution, num_ids: int, seed: int, share: int = 0, shares: int = 1, *, salt: int = 0
) -> IdStream:
    """The ids that share `share` of `shares` sends.

    Which ids are frequent follows from `seed` alone, so all shares agree on it; which come next from `salt` too.
    """
    if distribution.kind == "replay":
        return ReplayIds(distribution, num_ids, share, shares)
    different = read_different(distribution) if distribution.file else None
    stream = _drawn(distribution, num_ids if different is None else len(different), seed, [seed, share, salt])
    return stream if different is None else ListedIds(stream, different)


def _drawn(distribution: IdDistribution, num_ids: int, seed: int, draws: list[int]) -> IdStream:
    """Ids from [0, num_ids)."""
    if num_ids < 1:
        raise ScenarioError(f"ids.num_ids must be at least 1, got {num_ids}")
    rng = np.random.default_rng(draws)
    match distribution.kind:
        case "zipf":
            return ZipfIds(num_ids, distribution.exponent, Permutation(num_ids, seed), rng)
        case "uniform":
            return UniformIds(num_ids, rng)
        case "hot":
            return HotIds(num_ids, distribution, Permutation(num_ids, seed), rng)
    raise ScenarioError(f"ids.kind must be zipf, uniform, hot or replay, got {distribution.kind!r}")


class UniformIds:
    """Every id as often as every other."""

    def __init__(self, num_ids: int, rng: np.random.Generator) -> None:
        self.num_ids, self.rng = num_ids, rng

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        return self.rng.integers(self.num_ids, size=count)


class HotIds:
    """`hot_share` of the accesses go evenly to `hot_ids` ids, the others evenly to all others.

    Which ids are hot is a function of the second: the set moves through all ids, by `drift` of its size a minute.
    """

    def __init__(
        self, num_ids: int, distribution: IdDistribution, permutation: Permutation, rng: np.random.Generator
    ) -> None:
        if not 0 < distribution.hot_ids < num_ids:
            raise ScenarioError(
                f"ids.hot_ids must be at least 1 and below the {num_ids:,} ids, got {distribution.hot_ids:,}"
            )
        self.num_ids, self.distribution, self.permutation, self.rng = num_ids, distribution, permutation, rng

    def draw(self, count: int, second: float) -> Ids:
        hot_ids, rng = self.distribution.hot_ids, self.rng
        first = int(self.distribution.drift * hot_ids * second // 60) % self.num_ids
        hot_B, even_B = rng.random(count) < self.distribution.hot_share, rng.random(count)
        ranks_B = np.where(hot_B, even_B * hot_ids, hot_ids + even_B * (self.num_ids - hot_ids)).astype(np.int64)
        return self.permutation((ranks_B + first) % self.num_ids)


class ZipfIds:
    """The k-th most frequent id with probability ~ k ** -exponent; memory does not grow with the number of ids.

    Rejection-inversion (Hörmann and Derflinger, 1996): ranks are drawn from a density above the law, whose integral
    has an inverse, and the few that lie above the law are drawn again.
    """

    def __init__(self, num_ids: int, exponent: float, permutation: Permutation, rng: np.random.Generator) -> None:
        self.num_ids, self.exponent, self.permutation, self.rng = num_ids, exponent, permutation, rng
        self.begin = float(self._integral(np.array([1.5]))[0]) - 1.0
        self.end = float(self._integral(np.array([num_ids + 0.5]))[0])
        second = self._integral(np.array([2.5])) - 2.0**-exponent
        self.squeeze = 2.0 - float(self._inverse(second)[0])
        """Ranks so close above their draw are under the law for sure."""

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        ranks_B = np.empty(count, np.int64)
        missing = 0
        while missing < count:
            drawn = self._try(count - missing)
            ranks_B[missing : missing + len(drawn)] = drawn
            missing += len(drawn)
        return self.permutation(ranks_B - 1)

    def _try(self, count: int) -> Ids:
        """At most `count` ranks from 1 up."""
        u = self.end + self.rng.random(count) * (self.begin - self.end)
        x = self._inverse(u)
        ranks = np.clip(np.floor(x + 0.5), 1, self.num_ids)
        good = ranks - x <= self.squeeze
        (unsure,) = np.nonzero(~good)
        law = ranks[unsure] ** -self.exponent
        good[unsure] = u[unsure] >= self._integral(ranks[unsure] + 0.5) - law
        return ranks[good].astype(np.int64)

    def _integral(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of t ** -exponent from 1 to x; smooth where the exponent passes 1."""
        log = np.log(x)
        scaled = (1.0 - self.exponent) * log
        return log * _ratio(np.expm1, scaled)

    def _inverse(self, area: NDArray[np.float64]) -> NDArray[np.float64]:
        """The x up to which the integral is `area`."""
        scaled = np.maximum(area * (1.0 - self.exponent), -1.0 + 1e-15)
        return np.exp(area * _ratio(np.log1p, scaled))


class ListedIds:
    """Ids that are no range: the k-th of them stands where another stream says k."""

    def __init__(self, stream: IdStream, different: Ids) -> None:
        self.stream, self.different = stream, different

    def draw(self, count: int, second: float) -> Ids:
        return self.different[self.stream.draw(count, second)]


class ReplayIds:
    """The ids of a recording in its order, again from its start when it ends.

    Of every `shares` times `count` ids each share takes its `count`: shares that draw the same counts take the whole
    recording together.
    """

    def __init__(self, distribution: IdDistribution, num_ids: int, share: int, shares: int) -> None:
        self.ids, self.note = read_ids(distribution), ""
        if self.ids.dtype != object and num_ids and not distribution.as_recorded:
            self.ids, self.note = dense(self.ids, num_ids, distribution.file)
        self.share, self.shares, self.at = share, shares, 0
        self.cycled = False

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        first = self.at + self.share * count
        self.at += self.shares * count
        if first + count <= len(self.ids):
            return self.ids[first : first + count]
        self.cycled = True
        self.at %= len(self.ids)
        return self.ids[np.arange(first, first + count) % len(self.ids)]


def _ratio(function: np.ufunc, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """function(x) / x, and its limit 1 (to first order) where x is nearly 0."""
    small = np.abs(x) < 1e-12
    return np.where(small, 1.0, function(x) / np.where(small, 1.0, x))
