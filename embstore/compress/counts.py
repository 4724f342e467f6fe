"""How often each id is asked for, from a file: one number per row, or ids with their counts."""

# Shapes: N ids.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import DataError

SUFFIXES = (".npy", ".parquet")

Counts = NDArray[np.float64]


def read_counts(path: Path, num_ids: int, ids: NDArray[np.int64] | list[str] | None) -> Counts:
    """Counts of the ids in row order: float64 [N], finite, at least 0, not all 0; DataError otherwise.

    .npy: N numbers in row order. .parquet: two columns, ids and their counts, joined to `ids` (to row numbers where
    there are none): an id that is missing there counts 0, one that is missing here is left out.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: counts come as {' or '.join(SUFFIXES)}")
    counts_N = _read_npy(path, num_ids) if path.suffix == ".npy" else _read_parquet(path, num_ids, ids)
    if not counts_N.any():
        raise DataError(f"{path}: the counts of all {num_ids:,} ids are 0, at least one must be above")
    return counts_N


def _read_npy(path: Path, num_ids: int) -> Counts:
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # the header is Python text: damaged, it fails as a dozen different types
        raise DataError(f"{path}: {error}") from error
    if array.shape != (num_ids,) or array.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: needs one number per vector, shape [{num_ids}], got {array.dtype} {list(array.shape)}"
        )
    return _checked(array, path)


def _read_parquet(path: Path, num_ids: int, ids: NDArray[np.int64] | list[str] | None) -> Counts:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]}") from error
    kinds = list(frame.schema.values())
    if len(kinds) != 2 or not (kinds[0].is_integer() or kinds[0] == pl.String) or not kinds[1].is_numeric():
        shown = ", ".join(f"{name} {kind}" for name, kind in frame.schema.items())
        raise DataError(f"{path}: needs two columns, ids (integers or strings) and their counts, has {shown}")
    found, counts = frame.to_series(0).alias("id"), frame.to_series(1).alias("count")
    if found.null_count() or counts.null_count():
        raise DataError(f"{path}: ids and counts must not be null")
    if len(twice := found.filter(found.is_duplicated())):
        raise DataError(f"{path}: id {twice[0]!r} is there twice")
    _checked(counts.to_numpy(), path)
    wanted = pl.Series("id", range(num_ids) if ids is None else ids, dtype=pl.Int64 if ids is None else None)
    if (found.dtype == pl.String) != (wanted.dtype == pl.String):
        raise DataError(f"{path}: its ids are {found.dtype}, those of the vectors {wanted.dtype}")
    counted = pl.DataFrame({"id": _as(found, wanted.dtype), "count": counts.cast(pl.Float64)}).drop_nulls()
    joined = wanted.to_frame().join(counted, on="id", how="left", maintain_order="left")
    if joined["count"].null_count() == num_ids:
        raise DataError(f"{path}: none of its {len(found):,} ids is among the {num_ids:,} ids of the vectors")
    counts_N: Counts = joined["count"].fill_null(0.0).to_numpy(writable=True)
    return counts_N


def _as(ids: Any, dtype: Any) -> Any:
    """Ids in the type of the vectors' ids; null where they do not fit, as no vector has such an id."""
    return ids if ids.dtype == dtype else ids.cast(dtype, strict=False)


def _checked(array: NDArray[Any], path: Path) -> Counts:
    counts_N = np.array(array, np.float64)
    bad = np.flatnonzero(~(np.isfinite(counts_N) & (counts_N >= 0)))
    if len(bad):
        raise DataError(f"{path}: counts are finite and at least 0, got {counts_N[bad[0]]:g} in row {bad[0]:,}")
    return counts_N
