"""Ids as production asks for them: long-tailed, even, or a hot set that moves. The same for the same seed."""

# Shapes: B ids.

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embstore.common.zipf import Zipf
from loadtest.scenario.model import Keys, ScenarioError
from loadtest.workload.permutation import Scatter
from loadtest.workload.recording import dense, read_different, read_ids

Ids = NDArray[Any]
"""int64, or strings as objects."""


class KeyStream(Protocol):
    """Ids without an end."""

    def draw(self, count: int, second: float) -> Ids:
        """The next ids [count], asked for `second` seconds after the measurement began."""


def key_stream(keys: Keys, num_ids: int, seed: int, share: int = 0, shares: int = 1, *, salt: int = 0) -> KeyStream:
    """The ids that share `share` of `shares` asks for.

    Which ids are frequent follows from `seed` alone, so all shares agree on it; which come next from `salt` too.
    """
    if keys.kind == "replay":
        return ReplayKeys(keys, num_ids, share, shares)
    different = read_different(keys) if keys.file else None
    stream = _drawn(keys, num_ids if different is None else len(different), seed, [seed, share, salt])
    return stream if different is None else NamedKeys(stream, different)


def _drawn(keys: Keys, num_ids: int, seed: int, draws: list[int]) -> KeyStream:
    """Ids from [0, num_ids)."""
    if num_ids < 1:
        raise ScenarioError(f"keys.num_ids must be at least 1, got {num_ids}")
    rng = np.random.default_rng(draws)
    match keys.kind:
        case "zipf":
            return ZipfKeys(num_ids, keys.exponent, Scatter(num_ids, seed), rng)
        case "uniform":
            return UniformKeys(num_ids, rng)
        case "hot":
            return HotKeys(num_ids, keys, Scatter(num_ids, seed), rng)
    raise ScenarioError(f"keys.kind must be zipf, uniform, hot or replay, got {keys.kind!r}")


class UniformKeys:
    """Every id as often as every other."""

    def __init__(self, num_ids: int, rng: np.random.Generator) -> None:
        self.num_ids, self.rng = num_ids, rng

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        return self.rng.integers(self.num_ids, size=count)


class HotKeys:
    """`hot_share` of the accesses go evenly to `hot_ids` ids, the others evenly to all others.

    Which ids are hot is a function of the second: the set moves through all ids, by `drift` of its size a minute.
    """

    def __init__(self, num_ids: int, keys: Keys, scatter: Scatter, rng: np.random.Generator) -> None:
        if not 0 < keys.hot_ids < num_ids:
            raise ScenarioError(f"keys.hot_ids must be at least 1 and below the {num_ids:,} ids, got {keys.hot_ids:,}")
        self.num_ids, self.keys, self.scatter, self.rng = num_ids, keys, scatter, rng

    def draw(self, count: int, second: float) -> Ids:
        hot_ids, rng = self.keys.hot_ids, self.rng
        first = int(self.keys.drift * hot_ids * second // 60) % self.num_ids
        hot_B, even_B = rng.random(count) < self.keys.hot_share, rng.random(count)
        ranks_B = np.where(hot_B, even_B * hot_ids, hot_ids + even_B * (self.num_ids - hot_ids)).astype(np.int64)
        return self.scatter((ranks_B + first) % self.num_ids)


class ZipfKeys:
    """The k-th most frequent id with probability ~ k ** -exponent; memory does not grow with the number of ids."""

    def __init__(self, num_ids: int, exponent: float, scatter: Scatter, rng: np.random.Generator) -> None:
        self.law, self.scatter, self.rng = Zipf(num_ids, exponent), scatter, rng

    def draw(self, count: int, second: float) -> Ids:  # noqa: ARG002
        return self.scatter(self.law.draw(count, self.rng))


class NamedKeys:
    """Ids that are no range: the k-th of them stands where another stream says k."""

    def __init__(self, stream: KeyStream, different: Ids) -> None:
        self.stream, self.different = stream, different

    def draw(self, count: int, second: float) -> Ids:
        return self.different[self.stream.draw(count, second)]


class ReplayKeys:
    """The ids of a recording in its order, again from its start when it ends.

    Of every `shares` times `count` ids each share takes its `count`: shares that draw the same counts take the whole
    recording together.
    """

    def __init__(self, keys: Keys, num_ids: int, share: int, shares: int) -> None:
        self.ids, self.note = read_ids(keys), ""
        if self.ids.dtype != object and num_ids and not keys.as_recorded:
            self.ids, self.note = dense(self.ids, num_ids, keys.file)
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
