"""A recorded stream of ids, with its clock if it has one, from a Parquet file."""

# Shapes: R rows of the file.

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.errors import ScenarioError
from loadtest.scenario.model import IdDistribution


def read_ids(distribution: IdDistribution) -> NDArray[Any]:
    """Ids [R] in the order of the recording: int64, or strings as objects."""
    frame = _read(distribution)
    ids_R = _ids(frame[distribution.column])
    return ids_R[np.argsort(_times(frame, distribution), kind="stable")] if distribution.time_column else ids_R


def read_different(distribution: IdDistribution) -> NDArray[Any]:
    """The different ids of a recording, in the order in which they came first."""
    return _ids(_read(distribution)[distribution.column].unique(maintain_order=True))


def read_offsets(distribution: IdDistribution) -> NDArray[np.int64]:
    """Nanoseconds [R] from the start of the recording to each row, ascending, at `speed` times its pace."""
    times_R = np.sort(_times(_read(distribution), distribution), kind="stable")
    offsets_R: NDArray[np.int64] = np.rint((times_R - times_R[0]) * (1e6 / distribution.speed)).astype(np.int64)
    return offsets_R


def dense(ids_R: NDArray[np.int64], num_ids: int, file: str) -> tuple[NDArray[np.int64], str]:
    """The ids themselves where all lie in [0, num_ids), else numbers by first appearance; and what to say about it."""
    least, most = int(ids_R.min()), int(ids_R.max())
    if least >= 0 and most < num_ids:
        return ids_R, ""
    different, firsts, places = np.unique(ids_R, return_index=True, return_inverse=True)
    numbers = np.empty(len(different), np.int64)
    numbers[np.argsort(firsts)] = np.arange(len(different))
    note = (
        f"ids of {file} run from {least:,} to {most:,}, beyond the {num_ids:,} there are: numbered by first appearance"
    )
    if len(different) > num_ids:
        note += (
            f"; the last {len(different) - num_ids:,} of {len(different):,} are requested though the table lacks them"
        )
    return numbers[places], note


def _ids(column: Any) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values if values.dtype == object else values.astype(np.int64)


def _times(frame: Any, distribution: IdDistribution) -> NDArray[np.float64]:
    """Milliseconds [R]."""
    return frame[distribution.time_column].to_numpy().astype(np.float64)  # type: ignore[no-any-return]


@lru_cache(1)
def _read(distribution: IdDistribution) -> Any:
    """The columns of a recording, each of numbers without gaps; ScenarioError when they are not there.

    Ids and times are read at different moments: the second must find the file read, for requests are due by then.
    """
    try:
        import polars
    except ImportError:
        raise ScenarioError("ids.file: Parquet is read with polars: pip install 'embstore[train]'") from None
    if not Path(distribution.file).is_file():
        raise ScenarioError(f"ids.file {distribution.file!r} is no file")
    try:
        schema = polars.read_parquet_schema(distribution.file)
    except Exception as error:  # polars has many
        raise ScenarioError(
            f"ids.file {distribution.file!r} is no Parquet file: {str(error).splitlines()[0]}"
        ) from error
    columns = (
        {"column": distribution.column, "time_column": distribution.time_column}
        if distribution.time_column
        else {"column": distribution.column}
    )
    for field, name in columns.items():
        if name not in schema:
            raise ScenarioError(f"ids.{field}: {distribution.file} has no column {name!r}; it has {', '.join(schema)}")
        dtype, is_ids = schema[name], field == "column"
        if not (dtype.is_integer() or dtype == polars.String if is_ids else dtype.is_numeric()):
            kind = "integers or strings" if is_ids else "milliseconds"
            raise ScenarioError(
                f"ids.{field}: column {name!r} of {distribution.file} must hold {kind}, it holds {dtype}"
            )
    frame = polars.read_parquet(distribution.file, columns=list(dict.fromkeys(columns.values())))
    for name, count in zip(frame.columns, frame.null_count().row(0), strict=True):
        if count:
            raise ScenarioError(f"ids.file: column {name!r} of {distribution.file} lacks {count:,} of its values")
    if not frame.height:
        raise ScenarioError(f"ids.file {distribution.file!r} has no rows")
    return frame
