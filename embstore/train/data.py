"""From a file of events to rows: who did what, as row numbers of two tables, split into train, validation and test.

Rows are given by falling number of training events, ties by id, so row 0 is the most frequent id: schemes that
share rows by `row mod m` rely on it. The vocabularies hold the ids of training events and no others; an id that
occurs only in validation or test has a negative row, one of its own, and is never scored (as a target it is a miss).
"""

# Shapes: E events, N ids.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embstore.errors import DataError
from embstore.train.config import DataConfig
from embstore.train.events import read_events
from embstore.train.split import TEST, TRAIN, VALIDATION, with_part

Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class TableIds:
    """The ids of one table in row order, and each one's number of training events, falling."""

    ids: Int64s | list[str]
    num_events_N: Int64s

    def __len__(self) -> int:
        return len(self.num_events_N)


@dataclass(frozen=True)
class Pairs:
    """Events as rows: users_E[i] did items_E[i]; an id without a row has a negative number of its own."""

    users_E: Int64s
    items_E: Int64s

    def __len__(self) -> int:
        return len(self.users_E)


@dataclass(frozen=True)
class Dataset:
    """Everything a run learns from and is judged by.

    train: the events that are learned from. history: these and the older ones that `recent_events` leaves out.
    validation: decides when to stop. test: is looked at once, at the end.
    """

    users: TableIds
    items: TableIds
    train: Pairs
    history: Pairs
    validation: Pairs
    test: Pairs

    @property
    def known(self) -> Pairs:
        """All events that are not test: what a recommender may know when it is tested."""
        return Pairs(
            np.concatenate([self.history.users_E, self.validation.users_E]),
            np.concatenate([self.history.items_E, self.validation.items_E]),
        )


def read_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read, split and number the events; DataError when they cannot be trained on."""
    events = with_part(read_events(config), config, seed)
    history = events.filter(pl.col("part") == TRAIN)
    train = history
    if config.recent_events is not None:
        train = history.filter(_age(history) < config.recent_events)
    if not len(train):
        raise DataError(f"{config.path}: no training events are left after the split")
    users, items = _by_frequency(train["user"]), _by_frequency(train["item"])

    def pairs(part: pl.DataFrame) -> Pairs:
        return Pairs(_rows(part["user"], users), _rows(part["item"], items))

    dataset = Dataset(
        users=_ids(users),
        items=_ids(items),
        train=pairs(train),
        history=pairs(history),
        validation=pairs(events.filter(pl.col("part") == VALIDATION)),
        test=pairs(events.filter(pl.col("part") == TEST)),
    )
    for name in ("validation", "test"):
        if not len(getattr(dataset, name)):
            raise DataError(f"{config.path}: no {name} events are left after the split")
    return dataset


def _age(history: pl.DataFrame) -> pl.Series:
    """How many of the user's events come later, for each event."""
    ages = history.with_row_index("row").sort("user", "time", "row", descending=[False, True, True])
    return ages.with_columns(age=pl.int_range(pl.len()).over("user")).sort("row")["age"]


def _by_frequency(ids: pl.Series) -> pl.DataFrame:
    """Columns id, count and row: falling count, ties by id."""
    counted = pl.DataFrame({"id": ids}).group_by("id").agg(count=pl.len())
    ordered = counted.sort("count", "id", descending=[True, False])
    return ordered.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))


def _ids(ordered: pl.DataFrame) -> TableIds:
    ids: Any = ordered["id"].to_list() if ordered["id"].dtype == pl.String else ordered["id"].to_numpy()
    return TableIds(ids, ordered["count"].cast(pl.Int64).to_numpy(writable=True))


def _rows(ids: pl.Series, ordered: pl.DataFrame) -> Int64s:
    joined = pl.DataFrame({"id": ids}).join(ordered, on="id", how="left", maintain_order="left")
    unseen = -pl.col("id").rank("dense").cast(pl.Int64)
    rows: Int64s = joined.select(pl.col("row").fill_null(unseen))["row"].to_numpy(writable=True)
    return rows
