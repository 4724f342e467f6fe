"""What is compressed: vectors, their ids and how often each is asked for, from files as people have them."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.compress.counts import read_counts
from embstore.errors import ConfigError, DataError
from embstore.vectors import SUFFIXES, read_safetensors, read_vectors

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
NUM_NAMED = 12
CHECK_ROWS = 1 << 16

Int64s = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Source:
    """A table as it was found: vectors in row order, and what is known about each row.

    ids: in row order; None: rows are ids 0 .. N - 1. counts_N: how often each id is asked for, at least one
    above 0; None: not known.
    """

    vectors_ND: NDArray[np.float32]
    ids: Int64s | list[str] | None = None
    counts_N: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.vectors_ND)

    @property
    def dim(self) -> int:
        """Floats in one vector."""
        return int(self.vectors_ND.shape[1])

    def id_of(self, row: int) -> int | str:
        """The id of a row."""
        return row if self.ids is None else self.ids[row] if isinstance(self.ids, list) else int(self.ids[row])

    @property
    def falls(self) -> bool:
        """Whether row 0 is the most frequent id, row 1 the next, as schemes that share rows by number expect."""
        return self.counts_N is None or bool((np.diff(self.counts_N) <= 0).all())

    def by_count(self) -> Source:
        """The same table with rows by falling count, equal ones as they were; the ids keep their vectors."""
        if self.counts_N is None or self.falls:
            return self
        order_N = np.argsort(-self.counts_N, kind="stable")
        ids = order_N if self.ids is None else _taken(self.ids, order_N)
        return Source(self.vectors_ND[order_N], ids, self.counts_N[order_N])

    def hottest(self, most: int) -> list[int] | list[str]:
        """The ids asked for most, hottest first, none that is never asked for."""
        if self.counts_N is None:
            return []
        rows = np.argsort(-self.counts_N, kind="stable")[:most]
        return [self.id_of(int(row)) for row in rows if self.counts_N[row] > 0]  # type: ignore[return-value]


def read_source(vectors: Path, *, counts: Path | None = None, tensor: str | None = None) -> Source:
    """Vectors of a file, checked, with the counts of another; DataError says what cannot be used and why.

    .npy and .safetensors hold an array [N, D], .parquet a column of ids and one of vectors, .pt, .pth and .bin a torch
    state dict, of which nothing but tensors is read. `tensor` names the one to take where a file holds several.
    """
    if not vectors.is_file():
        raise DataError(f"{vectors}: no such file")
    if vectors.suffix in TORCH_SUFFIXES:
        array, ids = _one_of(_read_state_dict(vectors), tensor, vectors), None
    elif vectors.suffix == ".safetensors":
        array, ids = _one_of(read_safetensors(vectors), tensor, vectors), None
    elif vectors.suffix not in SUFFIXES:
        raise DataError(f"{vectors}: vectors come as {', '.join((*SUFFIXES, *TORCH_SUFFIXES))}")
    else:
        if tensor is not None:
            raise ConfigError(f"{vectors}: --tensor is for .safetensors and torch files, which hold several")
        array, ids = read_vectors(vectors)
    source = Source(_float32(array, str(vectors)), ids)
    _check_finite(source, vectors)
    return source if counts is None else replace(source, counts_N=read_counts(counts, len(source), ids))


def _read_state_dict(path: Path) -> dict[str, Any]:
    """Tensors by name, those of nested dicts under dotted names; code in the file is not run."""
    try:
        held = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails as anything at all
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not a file of tensors that can be read without running code: {first}") from error
    if isinstance(held, torch.Tensor):
        return {"tensor": held}
    if not isinstance(held, Mapping):
        raise DataError(f"{path}: holds a {type(held).__name__}, not a state dict")
    return dict(_flat(held))


def _flat(held: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]] = []
    for name, value in held.items():
        if isinstance(value, Mapping):
            named += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            named.append((f"{prefix}{name}", value))
    return named


def _one_of(held: Mapping[str, Any], tensor: str | None, path: Path) -> Any:
    """The tensor that is asked for, or the only one that can hold vectors."""
    if tensor is not None:
        if tensor not in held:
            raise DataError(f"{path}: no tensor named {tensor!r}; it holds {_listed(held)}")
        if not _holds_vectors(held[tensor]):
            raise DataError(f"{path}: vectors are floats [ids, dims], {_listed({tensor: held[tensor]})} is not")
        return held[tensor]
    fitting = {name: value for name, value in held.items() if _holds_vectors(value)}
    if not fitting:
        raise DataError(f"{path}: no tensor of floats [ids, dims] among {_listed(held)}")
    if len(fitting) > 1:
        raise DataError(f"{path}: holds {len(fitting)} tables, choose one with --tensor: {_listed(fitting)}")
    return next(iter(fitting.values()))


def _holds_vectors(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 2 and value.is_floating_point() and value.layout == torch.strided
    return bool(value.ndim == 2 and value.dtype.kind == "f")


def _listed(held: Mapping[str, Any]) -> str:
    """Names with dtypes and shapes, the first few of many."""
    named = [f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}" for name, value in held.items()]
    more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return (", ".join(named[:NUM_NAMED]) or "nothing") + more


def _float32(array: Any, what: str) -> NDArray[np.float32]:
    """A float32 copy in memory, row after row."""
    if isinstance(array, torch.Tensor):
        array = array.detach().float().numpy()
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{what}: a table of vectors has shape [ids, dims], got {list(array.shape)}")
    with np.errstate(over="ignore"):  # too large becomes infinity, and is found
        return np.array(array, np.float32, order="C")


def _check_finite(source: Source, path: Path) -> None:
    for start in range(0, len(source), CHECK_ROWS):
        bad = np.flatnonzero(~np.isfinite(source.vectors_ND[start : start + CHECK_ROWS]).all(axis=1))
        if len(bad):
            row = start + int(bad[0])
            which = f"row {row:,}" + ("" if source.ids is None else f" (id {source.id_of(row)!r})")
            raise DataError(f"{path}: NaN, infinity or a number too large for float32, first in {which}")


def _taken(ids: Int64s | list[str], rows_N: Int64s) -> Int64s | list[str]:
    return [ids[row] for row in rows_N] if isinstance(ids, list) else ids[rows_N]
