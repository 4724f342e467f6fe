"""What is compressed: which files of vectors and counts are read, and which are refused."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from support.compressing import COUNTS, KEYS, VECTORS, N

from embstore.compress.inputs import read_source
from embstore.errors import ConfigError, DataError


def state_dict(path: Path, held: Any, **options: Any) -> Path:
    """A torch file."""
    torch.save(held, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_state_dict_gives_its_only_table(tmp_path: Path, suffix: str, zipped: bool) -> None:
    """Whatever else it holds, in either format of torch, in half precision too."""
    held = {"bias": torch.ones(3), "epoch": 7, "item.weight": torch.from_numpy(VECTORS).bfloat16()}
    path = state_dict(tmp_path / f"m{suffix}", held, _use_new_zipfile_serialization=zipped)
    source = read_source(path)
    np.testing.assert_array_equal(source.vectors_ND, held["item.weight"].float().numpy())
    assert source.vectors_ND.dtype == np.float32
    assert source.ids is None


def test_a_tensor_is_chosen_by_name(tmp_path: Path) -> None:
    """From a state dict, from a checkpoint around one, from a module's parameters, from safetensors."""
    tables = {"user": torch.randn(5, 3), "item": torch.from_numpy(VECTORS)}
    safetensors.torch.save_file({"user": tables["user"], "item": tables["item"].bfloat16()}, tmp_path / "t.safetensors")
    found = [
        read_source(state_dict(tmp_path / "a.pt", tables), tensor="item"),
        read_source(state_dict(tmp_path / "b.pt", {"epoch": 1, "state": tables}), tensor="state.item"),
        read_source(state_dict(tmp_path / "c.pt", torch.nn.Embedding.from_pretrained(tables["item"]).state_dict())),
        read_source(state_dict(tmp_path / "d.pt", tables["item"])),
    ]
    for source in found:
        np.testing.assert_array_equal(source.vectors_ND, VECTORS)
    packed = read_source(tmp_path / "t.safetensors", tensor="item")
    np.testing.assert_array_equal(packed.vectors_ND, tables["item"].bfloat16().float().numpy())


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/never", "w"))


BAD_STATES: dict[str, tuple[Any, str | None, str]] = {
    "foreign keys": (
        {"a": torch.ones(3), "b": torch.ones(2, 2).int()},
        None,
        r"no tensor of floats \[ids, dims\] among a float32 \[3\], b int32 \[2, 2\]",
    ),
    "two tables": (
        {"a": torch.ones(3, 2), "b": torch.ones(4, 2)},
        None,
        r"holds 2 tables, choose one with --tensor: a float32 \[3, 2\], b float32 \[4, 2\]",
    ),
    "no such name": ({"a": torch.ones(3, 2)}, "c", r"no tensor named 'c'; it holds a float32 \[3, 2\]"),
    "wrong one": ({"a": torch.ones(3)}, "a", r"vectors are floats \[ids, dims\], a float32 \[3\] is not"),
    "empty": ({}, None, "among nothing"),
    "a list": ([torch.ones(3, 2)], None, "holds a list, not a state dict"),
    "no rows": ({"a": torch.ones(0, 2)}, None, r"shape \[ids, dims\], got \[0, 2\]"),
    "code": ({"a": Evil()}, None, "not a file of tensors that can be read without running code"),
    "many": ({f"b{i}": torch.ones(1) for i in range(40)}, None, r"b11 float32 \[1\] and 28 more"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_state_dicts_that_hold_no_table_are_refused(case: str, tmp_path: Path) -> None:
    """A state dict without a table is refused with the names, dtypes and shapes that it holds."""
    held, tensor, says = BAD_STATES[case]
    with pytest.raises(DataError, match=says):
        read_source(state_dict(tmp_path / "m.pt", held), tensor=tensor)


def test_files_that_are_not_vectors_are_refused(tmp_path: Path, vectors: Path) -> None:
    """A file that is missing, of another kind or damaged is refused, and so is --tensor where there is but one."""
    (tmp_path / "broken.pt").write_bytes(b"not a zip")
    (tmp_path / "v.csv").write_text("1,2")
    for name, says in (
        ("none.npy", "no such file"),
        ("v.csv", r"vectors come as \.npy, .*\.pth"),
        ("broken.pt", "not a file of tensors"),
    ):
        with pytest.raises(DataError, match=says):
            read_source(tmp_path / name)
    with pytest.raises(ConfigError, match="--tensor is for"):
        read_source(vectors, tensor="item")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    """Vectors that are not finite are refused; the first row is named, with its id where it has one."""
    wrong_ND = VECTORS.astype(np.float64)
    wrong_ND[[37, 90], 2] = bad
    np.save(tmp_path / "v.npy", wrong_ND)
    with pytest.raises(DataError, match=r"NaN, infinity or a number too large for float32, first in row 37$"):
        read_source(tmp_path / "v.npy")
    pl.DataFrame({"id": KEYS, "v": wrong_ND.tolist()}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError, match=f"first in row 37 \\(id '{KEYS[37]}'\\)"):
        read_source(tmp_path / "v.parquet")


@pytest.mark.parametrize("keys", [["a", "b", "c", "b"], [5, 7, -1, 7]])
def test_duplicate_ids_are_refused(tmp_path: Path, keys: Any) -> None:
    """Duplicate ids are refused; the message names one and where it is again."""
    pl.DataFrame({"id": keys, "v": VECTORS[:4].tolist()}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(DataError, match=f"id {keys[3]!r} is there twice, the second time in row 3"):
        read_source(tmp_path / "v.parquet")


def test_counts_are_joined_by_id(tmp_path: Path, keyed: Path, vectors: Path) -> None:
    """Counts are joined by id: a missing one counts 0, an unknown one is left out; without ids, row numbers."""
    pl.DataFrame({"key": [*KEYS[:3:-1], "unknown"], "n": [*COUNTS[:3:-1], 9]}).write_parquet(tmp_path / "c.parquet")
    found = read_source(keyed, counts=tmp_path / "c.parquet").counts_N
    np.testing.assert_array_equal(found, [0] * 4 + COUNTS[4:].tolist())
    ids = pl.Series([3, 399, 255, 60000], dtype=pl.UInt16)
    pl.DataFrame({"id": ids, "n": [0.5, 2.0, 1.0, 8.0]}).write_parquet(tmp_path / "r.parquet")
    found = read_source(vectors, counts=tmp_path / "r.parquet").counts_N
    assert found is not None
    assert {int(row): float(found[row]) for row in np.flatnonzero(found)} == {3: 0.5, 255: 1, 399: 2}
    np.save(tmp_path / "c.npy", COUNTS)
    found = read_source(keyed, counts=tmp_path / "c.npy").counts_N
    np.testing.assert_array_equal(found, COUNTS)


def frame(ids: Any, counts: Any) -> pl.DataFrame:
    """A file of ids and counts."""
    return pl.DataFrame({"id": ids, "count": counts})


BAD_COUNTS: dict[str, tuple[Any, str]] = {
    "short": (np.ones(N - 1), rf"one number per vector, shape \[{N}\], got float64 \[{N - 1}\]"),
    "matrix": (np.ones((N, 1)), rf"got float64 \[{N}, 1\]"),
    "texts": (np.array(["1"] * N), r"got <U1"),
    "negative": (np.where(np.arange(N) == 8, -3, 1), "finite and at least 0, got -3 in row 8"),
    "nan": (np.where(np.arange(N) == 9, np.nan, 1), "got nan in row 9"),
    "zeros": (np.zeros(N), f"counts of all {N} ids are 0"),
    "twice": (frame(["a", "a"], [1, 2]), "id 'a' is there twice"),
    "null": (frame(["a", None], [1, 2]), "must not be null"),
    "negative by id": (frame(["a", "b"], [1, -2]), "got -2 in row 1"),
    "infinite by id": (frame(["a", "b"], [math.inf, 2.0]), "got inf in row 0"),
    "other type": (frame([1, 2], [1, 2]), "its ids are Int64, those of the vectors String"),
    "strangers": (frame(["a", "b"], [1, 2]), f"none of its 2 ids is among the {N} ids"),
    "one column": (pl.DataFrame({"id": ["a"]}), "needs two columns, .* has id String"),
    "vectors": (frame(["a"], [[1.0]]), "needs two columns"),
    "ids last": (frame([0.5], ["a"]), "needs two columns"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_counts_that_cannot_be_are_refused(case: str, keyed: Path, tmp_path: Path) -> None:
    """Counts of another length, sign, NaN, duplicates and unknown ids are each refused with their numbers."""
    held, says = BAD_COUNTS[case]
    path = tmp_path / ("c.parquet" if isinstance(held, pl.DataFrame) else "c.npy")
    held.write_parquet(path) if isinstance(held, pl.DataFrame) else np.save(path, held)
    with pytest.raises(DataError, match=says):
        read_source(keyed, counts=path)


def test_counts_of_another_kind_are_refused(tmp_path: Path, keyed: Path) -> None:
    """A file of counts that is missing, damaged or of another suffix is refused."""
    (tmp_path / "c.csv").write_text("a,1")
    (tmp_path / "c.npy").write_bytes(b"not an array")
    (tmp_path / "c.parquet").write_bytes(b"not a table")
    for name, says in (("no.npy", "no such file"), ("c.csv", "counts come as"), ("c.npy", "c.npy"), ("c.parquet", "c")):
        with pytest.raises(DataError, match=says):
            read_source(keyed, counts=tmp_path / name)
