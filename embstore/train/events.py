"""Reading events: the columns that the config names, checked, under the names this package uses."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import polars as pl

from embstore.errors import ConfigError, DataError
from embstore.train.config import DataConfig

READERS: dict[str, Callable[[Path], pl.LazyFrame]] = {
    ".parquet": pl.scan_parquet,
    ".pq": pl.scan_parquet,
    ".csv": lambda path: pl.scan_csv(path, infer_schema_length=None),  # types from all rows, not from the first 100
}


def read_events(config: DataConfig) -> pl.DataFrame:
    """Columns user and item, and time and split where the config names them; ids are int64 or strings.

    ConfigError names a column that the file lacks, DataError what makes the events unusable (nulls, no rows, ids or
    times of another type, a file that cannot be read).
    """
    names = {"user": config.user, "item": config.item, "time": config.time, "split": config.split_column}
    columns = {role: column for role, column in names.items() if column is not None}
    events = _read(Path(config.path), columns)
    if not len(events):
        raise DataError(f"{config.path}: there are no events")
    for role, column in columns.items():
        if num_nulls := events[role].null_count():
            row = int(events[role].is_null().arg_max() or 0)
            raise DataError(f"{config.path}: column {column!r} has {num_nulls:,} nulls, the first in row {row}")
    checked = [_ids(events[role], f"{config.path}: column {columns[role]!r}") for role in ("user", "item")]
    if "time" in columns:
        checked.append(_times(events["time"], f"{config.path}: column {columns['time']!r}"))
    return events.with_columns(checked)


def _read(path: Path, columns: dict[str, str]) -> pl.DataFrame:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"data.path {path} must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        frame = reader(path)
        present = frame.collect_schema().names()
        for role, column in columns.items():
            if column not in present:
                near = get_close_matches(column, present, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                key = "split_column" if role == "split" else role
                raise ConfigError(f"data.{key} is {column!r}, but {path} has {', '.join(present)}{hint}")
        return frame.select(pl.col(column).alias(role) for role, column in columns.items()).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _ids(ids: pl.Series, where: str) -> pl.Series:
    if ids.dtype in (pl.Categorical, pl.Enum):
        return ids.cast(pl.String)
    if ids.dtype == pl.String:
        return ids
    if not ids.dtype.is_integer():
        raise DataError(f"{where} holds {ids.dtype}: ids are whole numbers or strings")
    try:
        return ids.cast(pl.Int64)
    except pl.exceptions.InvalidOperationError as error:
        raise DataError(f"{where} holds {ids.max()!r}: whole-number ids fit a signed 64-bit integer") from error


def _times(times: pl.Series, where: str) -> pl.Series:
    if times.dtype.is_temporal():
        return times.to_physical()
    if not times.dtype.is_numeric():
        raise DataError(f"{where} holds {times.dtype}: times are numbers or dates")
    if times.dtype.is_float() and times.is_nan().any():
        raise DataError(f"{where} holds NaN: times have an order")
    return times
