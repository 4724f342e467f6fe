"""Ids as production requests them: long-tailed, even, or a hot set that moves. The same for the same seed."""

# Shapes: B ids.

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.common.zipf import Zipf
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
    """The k-th most frequent id with probability ~ k ** -exponent; memory does not grow with the number of ids."""

    def __init__(self, num_ids: int, exponent: float, permutation: Permutation, rng: np.random.Generator) -> None:
        self.law, self.permutation, self.rng = Zipf(num_ids, exponent), permutation, rng

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        return self.permutation(self.law.draw(count, self.rng))


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
