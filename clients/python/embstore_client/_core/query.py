"""What a call asks of one table: ids, and where they are pooled, the bags that they make.

Shapes: n ids, g bags of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.ids import INT64, Ids, normalize_ids

POOLINGS = ("sum", "mean", "max")
POOLING_DEFAULT = "mean"


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """Ids of one table that are pooled by the server: one vector a bag.

    Attributes:
        ids: `[n]`, as in `lookup`.
        offsets: `[g]` integers: where each bag starts, as in `torch.nn.EmbeddingBag`. The first is 0, they never
            fall, and a bag ends where the next one starts, the last one at the end of the ids. A bag may be empty.
        pooling: `"sum"`, `"mean"` or `"max"`.
        weights: `[n]` numbers, one for each id; None for all 1. Not with `"max"`.
    """

    ids: Ids
    offsets: Sequence[int] | NDArray[Any]
    pooling: str = POOLING_DEFAULT
    weights: Sequence[float] | NDArray[Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """Checked ids, ready for the wire; with `offsets` and `pooling` they are bags, and a row is a bag, else an id."""

    ids: NDArray[np.int64] | list[str]
    offsets: NDArray[np.int64] | None = None
    pooling: str | None = None
    weights: NDArray[np.float32] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.ids) if self.offsets is None else len(self.offsets)

    @property
    def size(self) -> int:
        """What a server counts against its limit: ids, or bags where they are more."""
        return len(self.ids) if self.offsets is None else max(len(self.ids), len(self.offsets))

    def copy(self) -> Query:
        """The same in memory of its own: what a caller does to its arrays while the answer travels changes nothing."""
        ids = self.ids if isinstance(self.ids, list) else self.ids.copy()
        if self.offsets is None:
            return Query(ids)
        weights = None if self.weights is None else self.weights.copy()
        return Query(ids, self.offsets.copy(), self.pooling, weights)

    def first_id(self, row: int) -> int:
        """Where the ids of a row start; of the row after the last, where they end."""
        if self.offsets is None:
            return row
        return int(self.offsets[row]) if row < len(self.offsets) else len(self.ids)

    def rows(self, first: int, last: int) -> Query:
        """The rows from `first` to `last`, which is left out."""
        start, stop = self.first_id(first), self.first_id(last)
        if self.offsets is None:
            return Query(self.ids[start:stop])
        weights = None if self.weights is None else self.weights[start:stop]
        return Query(self.ids[start:stop], self.offsets[first:last] - start, self.pooling, weights)

    def last_within(self, first: int, limit: int) -> int:
        """How far the rows from `first` on may go so that they have at most `limit` ids, and are at most so many."""
        last = min(first + limit, self.num_rows)
        if self.offsets is None:
            return last
        ends = np.append(self.offsets[first + 1 : last + 1], len(self.ids))[: last - first]
        return first + int(np.searchsorted(ends, self.first_id(first) + limit, side="right"))


Given: TypeAlias = Ids | Bags | Query


def query_of(given: Given) -> Query:
    """What a caller gives for one table, checked.

    Raises:
        TypeError, ValueError: ids, offsets, pooling or weights that no server could answer.
    """
    if isinstance(given, Query):
        return given
    if not isinstance(given, Bags):
        return Query(normalize_ids(given))
    ids = normalize_ids(given.ids)
    if given.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {given.pooling!r:.40}")
    weights = None
    if given.weights is not None:
        if given.pooling == "max":
            raise ValueError("pooling 'max' takes no weights: leave them out, or pool by sum or mean")
        weights = _checked_weights(given.weights, len(ids))
    return Query(ids, _checked_offsets(given.offsets, len(ids)), given.pooling, weights)


def bags_of_call(ids: Ids, offsets: Any, pooling: str | None, weights: Any) -> Ids | Bags:
    """The ids themselves, or the bags that the other arguments of a lookup make of them."""
    if offsets is not None:
        return Bags(ids, offsets, POOLING_DEFAULT if pooling is None else pooling, weights)
    if pooling is None and weights is None:
        return ids
    given = "weights" if pooling is None else f"pooling {pooling!r:.40}"
    raise ValueError(f"{given} without offsets: give offsets, the place where each bag starts; [0] is one bag")


def _checked_offsets(offsets: Any, num_ids: int) -> NDArray[np.int64]:
    array = normalize_ids(offsets)  # the same kinds of integers do
    if isinstance(array, list):
        if array:
            raise TypeError("offsets must be integers, got strings")
        array = np.empty(0, INT64)
    if not len(array):
        if num_ids:
            raise ValueError(f"offsets is empty, but there are {num_ids:,} ids: the first bag starts at 0")
        return array
    if array[0] != 0:
        raise ValueError(f"offsets[0] is {array[0]}; it must be 0, where the first bag starts")
    falls = np.flatnonzero(array[1:] < array[:-1])
    if len(falls):
        at = int(falls[0]) + 1
        raise ValueError(f"offsets[{at}] is {array[at]}, less than {array[at - 1]} before it: bags are in order")
    if array[-1] > num_ids:
        at = int(np.searchsorted(array, num_ids, side="right"))
        raise ValueError(f"offsets[{at}] is {array[at]}, past the end of {num_ids:,} ids")
    return array


def _checked_weights(weights: Any, num_ids: int) -> NDArray[np.float32]:
    given = np.asarray(weights)
    if given.dtype.kind not in "fiu":
        raise TypeError(f"weights must be numbers, got {given.dtype}")
    if given.shape != (num_ids,):
        raise ValueError(f"weights must be one number for each of {num_ids:,} ids, got shape {given.shape}")
    with np.errstate(over="ignore"):
        numbers = given.astype("<f4")
    if not np.isfinite(numbers).all():
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"weights[{at}] is {given[at]}: a weight is a finite float32 number")
    return numbers
