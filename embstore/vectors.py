"""Files of vectors, as people have them: .npy, .safetensors, .parquet."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore.errors import DataError, VerificationFailed

SUFFIXES = (".npy", ".safetensors", ".parquet")


def read_vectors(path: Path) -> tuple[NDArray[Any], NDArray[np.int64] | list[str] | None]:
    """Vectors [N, D] of a file and the ids in their order (None: rows are ids 0 .. N - 1); DataError otherwise.

    .npy and .safetensors hold one 2-d array; .parquet one column of ids (integers or strings, first such column) and
    one of equally long lists of numbers.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: vectors come as {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    array = _read_npy(path) if path.suffix == ".npy" else _only_array(path)
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"{path}: vectors are numbers of shape [ids, dims], got {array.dtype} {list(array.shape)}")
    return array, None


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header is Python text: damaged, it fails as a dozen different types
        raise DataError(f"{path}: {error}") from error


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file by name, bfloat16 as float32; DataError when it cannot be read."""
    from embstore.quantize import unpack_bfloat16
    from embstore.store.tensor_file import map_file, read_arrays

    try:
        arrays = read_arrays(map_file(path), str(path))
    except (OSError, VerificationFailed) as error:
        raise DataError(f"{path}: {error}") from error
    # The reader gives bfloat16 as the bits it is made of.
    return {name: unpack_bfloat16(array) if array.dtype == np.uint16 else array for name, array in arrays.items()}


def _only_array(path: Path) -> NDArray[Any]:
    arrays = read_safetensors(path)
    if len(arrays) != 1:
        raise DataError(f"{path}: expected one array of vectors, found {', '.join(arrays) or 'none'}")
    return next(iter(arrays.values()))


def _read_parquet(path: Path) -> tuple[NDArray[Any], NDArray[np.int64] | list[str]]:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: {error}") from error
    columns = [name for name, kind in frame.schema.items() if kind.is_integer() or kind == pl.String]
    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List | pl.Array)]
    if not columns or not lists:
        raise DataError(f"{path}: needs a column of ids and a column of lists, has {frame.schema}")
    ids, vectors = frame[columns[0]], frame[lists[0]]
    if frame.height == 0 or ids.null_count() or vectors.null_count():
        raise DataError(f"{path}: {'no rows' if frame.height == 0 else 'ids and vectors must not be null'}")
    if not (first := ids.is_first_distinct()).all():
        row = int(first.not_().arg_max() or 0)
        raise DataError(f"{path}: id {ids[row]!r} is there twice, the second time in row {row:,}")
    widths = (pl.Series([vectors.dtype.size]) if isinstance(vectors.dtype, pl.Array) else vectors.list.len()).unique()
    if len(widths) != 1 or not widths[0]:
        raise DataError(f"{path}: vectors in {lists[0]!r} have different lengths")
    flat = vectors.explode()
    if flat.null_count() or not flat.dtype.is_numeric():
        raise DataError(f"{path}: vectors in {lists[0]!r} must be numbers without nulls")
    array = flat.cast(pl.Float32).to_numpy().reshape(frame.height, int(widths[0]))
    if ids.dtype == pl.String:
        return array, ids.to_list()
    try:
        return array, ids.cast(pl.Int64).to_numpy()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: ids in {columns[0]!r} must fit a signed 64-bit integer") from error
