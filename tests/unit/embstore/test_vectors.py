"""Files of vectors as people have them become arrays and keys; anything else is a DataError that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore import open_store
from embstore.errors import DataError
from embstore.vectors import read_vectors

VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) / 4
ROWS = VECTORS.tolist()


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "u1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_holds_numbers_of_any_type_and_order(tmp_path: Path, dtype: str, order: Any) -> None:
    """The array as saved, mapped and not loaded; rows are ids 0 to N - 1."""
    array = np.array(VECTORS * 4, dtype, order=order)
    np.save(tmp_path / "v.npy", array)
    found, keys = read_vectors(tmp_path / "v.npy")
    assert keys is None
    assert found.dtype == array.dtype
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.int64])
def test_safetensors_holds_one_array_of_any_name(tmp_path: Path, dtype: Any) -> None:
    """A file of the safetensors library, with metadata, is read as it is."""
    array = (VECTORS * 4).astype(dtype)
    safetensors.numpy.save_file({"any name": array}, tmp_path / "v.safetensors", metadata={"a": "b"})
    found, keys = read_vectors(tmp_path / "v.safetensors")
    assert keys is None
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_safetensors_data_may_start_anywhere(tmp_path: Path) -> None:
    """A writer that pads nothing leaves floats at odd addresses: they are read, and published, all the same."""
    header = b'{"w":{"dtype":"F32","shape":[4,3],"data_offsets":[0,48]}}'
    header += b" " * (len(header) % 2 == 0)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + VECTORS.tobytes())
    found, _ = read_vectors(path)
    assert not found.flags.aligned
    np.testing.assert_array_equal(found, VECTORS)
    store = open_store(tmp_path / "store")
    store.publish("item", path)
    np.testing.assert_array_equal(store.load("item").lookup([3, 0]), VECTORS[[3, 0]])


KEYS: dict[str, tuple[Any, Any]] = {
    "int64": (pl.Int64, [5, -7, 2**62, 0]),
    "int32": (pl.Int32, [5, -7, 2**30, 0]),
    "uint8": (pl.UInt8, [5, 255, 1, 0]),
    "uint64": (pl.UInt64, [5, 2**63 - 1, 1, 0]),
    "string": (pl.String, ["a", "", "ключ", "a\0"]),
}


@pytest.mark.parametrize(
    "kind",
    [pl.List(pl.Float32), pl.List(pl.Float64), pl.Array(pl.Float32, 3), pl.Array(pl.Float64, 3), pl.List(pl.Int16)],
    ids=str,
)
@pytest.mark.parametrize("keys", KEYS)
def test_parquet_holds_keys_and_lists(tmp_path: Path, keys: str, kind: pl.DataType) -> None:
    """A column of keys and one of lists, in any order, beside others: float32 vectors and their keys."""
    dtype, values = KEYS[keys]
    rows = [[int(x * 4) for x in row] for row in ROWS] if kind == pl.List(pl.Int16) else ROWS
    columns: dict[str, Any] = {
        "score": [0.5] * 4,
        "vector": pl.Series(rows, dtype=kind),
        "key": pl.Series(values, dtype=dtype),
    }
    pl.DataFrame(columns).write_parquet(tmp_path / "v.parquet")
    found, found_keys = read_vectors(tmp_path / "v.parquet")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(rows, np.float32))
    assert found_keys is not None
    assert list(found_keys) == values
    assert isinstance(found_keys, list) == (keys == "string")
    assert isinstance(found_keys, list) or found_keys.dtype == np.int64


def test_what_is_read_can_be_published(tmp_path: Path) -> None:
    """From a Parquet file to vectors by key, in one call."""
    frame = pl.DataFrame({"id": ["x", "y", "z", ""], "v": ROWS})
    frame.write_parquet(tmp_path / "v.parquet")
    store = open_store(tmp_path / "store")
    store.publish("item", tmp_path / "v.parquet")
    np.testing.assert_array_equal(store.load("item").lookup(["", "x"]), VECTORS[[3, 0]])


IDS = [1, 2, 3, 4]
BAD_FRAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"v": ROWS}, "needs a column of ids and a column of lists"),
    "no lists": ({"id": IDS, "v": [0.5] * 4}, "needs a column of ids and a column of lists"),
    "float ids": ({"id": [1.0, 2.0, 3.0, 4.0], "v": ROWS}, "needs a column of ids"),
    "an id twice": ({"id": [1, 2, 3, 2], "v": ROWS}, "id 2 is there twice, the second time in row 3"),
    "a key twice": ({"id": ["a", "b", "b", "b"], "v": ROWS}, "id 'b' is there twice, the second time in row 2"),
    "no rows": ({"id": pl.Series([], dtype=pl.Int64), "v": pl.Series([], dtype=pl.List(pl.Float32))}, "no rows"),
    "null id": ({"id": [1, None, 3, 4], "v": ROWS}, "must not be null"),
    "null vector": ({"id": IDS, "v": [*ROWS[:3], None]}, "must not be null"),
    "null number": ({"id": IDS, "v": [*ROWS[:3], [1.0, None, 2.0]]}, "without nulls"),
    "ragged": ({"id": IDS, "v": [*ROWS[:3], [1.0]]}, "different lengths"),
    "empty vectors": ({"id": IDS, "v": pl.Series([[]] * 4, dtype=pl.List(pl.Float32))}, "lengths"),
    "one empty vector": ({"id": IDS, "v": [*ROWS[:3], []]}, "different lengths"),
    "texts": ({"id": IDS, "v": [["a", "b"]] * 4}, "must be numbers"),
    "booleans": ({"id": IDS, "v": [[True, False]] * 4}, "must be numbers"),
    "matrices": ({"id": IDS, "v": [[[1.0], [2.0]]] * 4}, "must be numbers"),
    "array matrices": (
        {"id": IDS, "v": pl.Series([[[1.0], [2.0]]] * 4, dtype=pl.Array(pl.Float32, (2, 1)))},
        "numbers",
    ),
    "large ids": ({"id": pl.Series([1, 2, 3, 2**63], dtype=pl.UInt64), "v": ROWS}, "'id' must fit a signed 64-bit"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_parquet_that_holds_no_vectors_is_refused(tmp_path: Path, name: str) -> None:
    """DataError names the file and what is wrong with it."""
    columns, named = BAD_FRAMES[name]
    path = tmp_path / "v.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(DataError, match=f"v.parquet: .*{named}"):
        read_vectors(path)


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.0),
        np.ones(3, np.float32),
        np.ones((2, 2, 2), np.float32),
        np.ones((2, 2), np.complex64),
        np.ones((2, 2), bool),
        np.array([["a", "b"]]),
        np.array([[None, 1]], object),
        np.zeros((2, 2), [("x", "<f4")]),
        np.zeros((2, 2), "M8[s]"),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_npy_that_holds_no_vectors_is_refused(tmp_path: Path, array: Any) -> None:
    """Vectors are numbers in two dimensions; pickled objects are not loaded."""
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(DataError, match=r"v\.npy: "):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({}, "expected one array of vectors, found none"),
        ({"a": VECTORS, "b": VECTORS}, "expected one array of vectors, found a, b"),
        ({"a": VECTORS[0]}, r"shape \[ids, dims\], got float32 \[3\]"),
    ],
)
def test_safetensors_that_hold_no_vectors_are_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], named: str
) -> None:
    """Which of several arrays are the vectors is not guessed."""
    safetensors.numpy.save_file(arrays, tmp_path / "v.safetensors")
    with pytest.raises(DataError, match=rf"v\.safetensors: .*{named}"):
        read_vectors(tmp_path / "v.safetensors")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("content", [b"", b"\x00", b"not at all", b"PK\x03\x04" + b"\x00" * 60, b"\xff" * 200])
def test_a_file_of_something_else_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    """The suffix promises what the content does not keep."""
    path = tmp_path / f"v{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"v\{suffix}: "):
        read_vectors(path)


def test_an_archive_under_another_name_is_refused(tmp_path: Path) -> None:
    """numpy would open a renamed .npz as a set of arrays; here it is no .npy."""
    np.savez(tmp_path / "v.npz", a=VECTORS)
    (tmp_path / "v.npz").rename(tmp_path / "v.npy")
    with pytest.raises(DataError, match=r"v\.npy: "):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize("name", ["v.csv", "v", "v.npz", "v.NPY"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    """DataError lists those that are read."""
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"vectors come as \.npy, \.safetensors, \.parquet"):
        read_vectors(tmp_path / name)


def test_no_file_is_no_vectors(tmp_path: Path) -> None:
    """A missing file and a folder are told as such."""
    for path in (tmp_path / "v.npy", tmp_path):
        with pytest.raises(DataError, match="no such file"):
            read_vectors(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One sound file of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    np.save(folder / "v.npy", VECTORS)
    safetensors.numpy.save_file({"w": VECTORS}, folder / "v.safetensors")
    pl.DataFrame({"id": IDS, "v": ROWS}).write_parquet(folder / "v.parquet")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:numpy", "ignore::UserWarning:numpy")
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3)), max_size=5))
@example(changes=[(0.4, b"((")])
@example(changes=[(0.4, b"\xff")])
def test_damaged_files_never_crash_the_reader(
    sound: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, suffix: str, changes: list[tuple[float, bytes]]
) -> None:
    """Bytes overwritten anywhere: vectors are read, or DataError says why not."""
    data = bytearray(sound[suffix])
    for where, what in changes:
        position = int(where * len(data))
        data[position : position + len(what)] = what
    path = tmp_path_factory.mktemp("damaged") / f"v{suffix}"
    path.write_bytes(data)
    try:
        found, _ = read_vectors(path)
    except DataError:
        return
    assert found.ndim == 2


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_file_cut_short_is_refused(sound: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    """Whatever is left of a file whose end is missing is not taken for all of it."""
    path = tmp_path / f"v{suffix}"
    for length in range(0, len(sound[suffix]), 7):
        path.write_bytes(sound[suffix][:length])
        with pytest.raises(DataError, match=rf"v\{suffix}: "):
            read_vectors(path)
