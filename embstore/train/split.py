"""Which events are learned from, which decide when to stop, which are the test."""

from __future__ import annotations

import numpy as np
import polars as pl

from embstore.errors import ConfigError, DataError
from embstore.train.config import DataConfig

TRAIN, VALIDATION, TEST = 0, 1, 2


def with_part(events: pl.DataFrame, config: DataConfig, seed: int) -> pl.DataFrame:
    """The events, in the order of the file, with a column `part`: TRAIN, VALIDATION or TEST."""
    if config.split == "leave_last_out":
        return leave_last_out(events, config.num_validation, seed)
    marked = given(events, config)
    return marked if config.validation_value is not None else hold_out(marked, config.num_validation or 0, seed)


def leave_last_out(events: pl.DataFrame, num_validation: int | None, seed: int) -> pl.DataFrame:
    """Each user's last event by time is TEST, the one before it VALIDATION (for `num_validation` users; None: all).

    Events at the same time keep the order of the file. A user always keeps an event to learn from: with two there is
    no validation event, with one no test event.
    """
    ordered = events.with_row_index("order").sort("user", "time", "order")
    later, total = pl.len().over("user") - 1 - pl.int_range(pl.len()).over("user"), pl.len().over("user")
    part = pl.when((later == 0) & (total > 1)).then(TEST).when((later == 1) & (total > 2)).then(VALIDATION)
    marked = ordered.with_columns(part=part.otherwise(TRAIN)).sort("order")
    if num_validation is not None:
        rows = np.flatnonzero(marked["part"].to_numpy() == VALIDATION)
        marked = _mark(marked, _draw(rows, len(rows) - num_validation, seed), TRAIN)
    return marked.drop("order")


def given(events: pl.DataFrame, config: DataConfig) -> pl.DataFrame:
    """The parts that the split column names; a value that the config does not name is a ConfigError."""
    named = {TRAIN: config.train_value, VALIDATION: config.validation_value, TEST: config.test_value}
    parts = {value: part for part, value in named.items() if value is not None}
    found = events["split"].unique().sort().to_list()
    for value in found:
        if value not in parts:
            raise ConfigError(f"column {config.split_column!r} holds {value!r}, which no data.*_value names")
    for value in parts:
        if value not in found:
            raise ConfigError(f"column {config.split_column!r} never holds {value!r}; it holds {found}")
    part = [parts[value] for value in found]
    return events.with_columns(part=pl.col("split").replace_strict(found, part, return_dtype=pl.Int32)).drop("split")


def hold_out(events: pl.DataFrame, num_validation: int, seed: int) -> pl.DataFrame:
    """Turn `num_validation` TRAIN events into VALIDATION; every user and every item keeps one to learn from."""
    is_train = pl.col("part") == TRAIN
    first = pl.col("user").is_first_distinct() | pl.col("item").is_first_distinct()
    spare = events.with_row_index("row").filter(is_train).filter(~first)["row"].to_numpy()
    if not len(spare):
        raise DataError("there are too few training events to hold any out for validation")
    return _mark(events, _draw(spare, num_validation, seed), VALIDATION)


def _draw(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of these rows without replacement (all, when there are not so many; none, when below 0)."""
    count = max(0, min(count, len(rows)))
    return np.random.default_rng(seed).choice(rows, count, replace=False)


def _mark(events: pl.DataFrame, rows: np.ndarray, part: int) -> pl.DataFrame:
    parts = events["part"].to_numpy().copy()
    parts[rows] = part
    return events.with_columns(part=pl.Series(parts))
