"""Array files are safetensors files, laid out for lookups, and a damaged one is an error, never a crash."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from embstore.errors import VerificationFailed
from embstore.store.tensor_file import DTYPES, LINE, MAX_HEADER, map_file, read_arrays, write_arrays

pytestmark = pytest.mark.slow

Arrays = dict[str, NDArray[Any]]
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
ARRAYS = st.dictionaries(
    NAMES,
    st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "BF16"]).flatmap(  # numpy has no bfloat16
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    ),
    max_size=5,
)
SAMPLE: Arrays = {
    "weight": np.arange(32, dtype=np.float32).reshape(2, 16),
    "keys": np.array([2**63 - 1, -(2**63), 0]),
    "ids.bytes": np.array([1, 2, 255], np.uint8),
}


def written(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    write_arrays(file, arrays)
    return file.getvalue()


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    """The header and where the data starts."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


def with_header(header: str | bytes | dict[str, Any], data: bytes = b"\0" * 64) -> memoryview:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return memoryview(struct.pack("<Q", len(encoded)) + encoded + data)


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@given(arrays=ARRAYS)
def test_what_is_written_is_read(arrays: Arrays) -> None:
    """Any arrays of the stored types, of any shape, come back equal byte for byte, and cannot be written to."""
    found = read_arrays(memoryview(written(arrays)), "here")
    assert_same(found, arrays)
    assert not any(array.flags.writeable for array in found.values())


@given(arrays=ARRAYS)
def test_the_safetensors_library_reads_what_we_write(arrays: Arrays) -> None:
    """An independent reader finds the same names, types, shapes and bytes."""
    assert_same(safetensors.numpy.load(written(arrays)), arrays)


@given(arrays=ARRAYS)
def test_we_read_what_the_safetensors_library_writes(arrays: Arrays) -> None:
    """Files of an independent writer are read, its metadata skipped."""
    data = safetensors.numpy.save(arrays, metadata={"format": "np"})
    assert_same(read_arrays(memoryview(data), "here"), arrays)


def test_every_stored_type_is_the_formats(tmp_path: Path) -> None:
    """The names of types are those of the format, by the library's own reading of a file on disk."""
    arrays = {name: np.arange(5).astype(dtype) for name, dtype in DTYPES.items()}
    path = tmp_path / "arrays.safetensors"
    path.write_bytes(written(arrays))
    with safetensors.safe_open(path, framework="np") as file:
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {name: name for name in DTYPES}  # noqa: SIM118


@given(arrays=ARRAYS)
def test_data_starts_on_lines_and_arrays_where_they_can_be_read(arrays: Arrays) -> None:
    """Data begin at a multiple of 64; so does every array of whole lines; every other one is aligned to its type."""
    data = written(arrays)
    header, start = header_of(data)
    assert start % LINE == 0
    assert len(data) - start == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        low, high = header[name]["data_offsets"]
        assert high - low == array.nbytes
        assert low % (LINE if array.nbytes % LINE == 0 else array.itemsize) == 0


def test_bytes_are_golden() -> None:
    """Published files have a digest: the same arrays give the same bytes, for ever."""
    header = (
        b'{"weight":{"dtype":"F32","shape":[2,16],"data_offsets":[0,128]},'
        b'"keys":{"dtype":"I64","shape":[3],"data_offsets":[128,152]},'
        b'"ids.bytes":{"dtype":"U8","shape":[3],"data_offsets":[152,155]}}'
    )
    body = struct.pack("<32f3q3B", *range(32), 2**63 - 1, -(2**63), 0, 1, 2, 255)
    expected = struct.pack("<Q", 248) + header.ljust(248) + body
    assert written(SAMPLE) == expected
    assert written(dict(reversed(SAMPLE.items()))) == expected


def test_views_are_written_as_what_they_show() -> None:
    """Transposed, strided and column-ordered arrays are stored row by row."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"turned": base.T, "strided": base[::2, 1::2], "columns": np.asfortranarray(base)}
    assert_same(read_arrays(memoryview(written(views)), "here"), {k: np.ascontiguousarray(v) for k, v in views.items()})


def test_a_mapped_file_is_the_file(tmp_path: Path) -> None:
    """Arrays over a mapped file are views of it: read-only, aligned to lines, and no copies."""
    path = tmp_path / "arrays.safetensors"
    path.write_bytes(written(SAMPLE))
    data = map_file(path)
    found = read_arrays(data, "here")
    assert_same(found, SAMPLE)
    assert bytes(data) == path.read_bytes()
    assert found["weight"].ctypes.data % LINE == 0
    with path.open("r+b") as file:
        file.seek(header_of(path.read_bytes())[1])
        file.write(struct.pack("<f", 77.0))
    assert found["weight"][0, 0] == 77.0
    with pytest.raises(ValueError, match="read-only"):
        found["weight"][0, 0] = 1.0


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """No bytes can be mapped, and none are a file of arrays."""
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(VerificationFailed, match=r"^there: not a readable safetensors file: shorter than its header$"):
        read_arrays(map_file(path), "there")
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "nothing")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        b"\xff\xfe",
        "[" * 100_000,
        '{"a":' * 100_000,
        {"a": None},
        {"a": []},
        {"a": "F32"},
        {"a": {}},
        *({"a": {k: v for k, v in ENTRY.items() if k != gone}} for gone in ENTRY),
        {"a": ENTRY | {"dtype": "F33"}},
        {"a": ENTRY | {"dtype": "BF16"}},
        {"a": ENTRY | {"dtype": None}},
        {"a": ENTRY | {"dtype": ["F32"]}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY | {"shape": [-2]}},
        {"a": ENTRY | {"shape": [-1, -2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"shape": [True, 2]}},
        {"a": ENTRY | {"shape": ["2"]}},
        {"a": ENTRY | {"shape": "2"}},
        {"a": ENTRY | {"shape": 2}},
        {"a": ENTRY | {"shape": None}},
        {"a": ENTRY | {"shape": [2**62, 2**62, 2**62]}},
        {"a": ENTRY | {"shape": [2**64 + 2]}},
        {"a": ENTRY | {"shape": [0, 2**70], "data_offsets": [0, 0]}},
        {"a": ENTRY | {"shape": [2, *[1] * 100]}},
        {"a": ENTRY | {"data_offsets": [0, 7]}},
        {"a": ENTRY | {"data_offsets": [60, 68]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [2**70, 2**70 + 8]}},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"data_offsets": [0, 8, 16]}},
        {"a": ENTRY | {"data_offsets": [0.0, 8.0]}},
        {"a": ENTRY | {"data_offsets": ["0", "8"]}},
        {"a": ENTRY | {"data_offsets": "08"}},
        {"a": ENTRY | {"data_offsets": None}},
        '{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + "9" * 5000 + "]}}",
    ],
    ids=lambda header: str(header)[:70],
)
def test_a_header_that_makes_no_sense_is_refused(header: Any) -> None:
    """Whatever is wrong with it, VerificationFailed names the file."""
    with pytest.raises(VerificationFailed, match=r"^there: not a readable safetensors file: "):
        read_arrays(with_header(header), "there")


def test_the_sound_header_beside_those_is_read() -> None:
    """The header from which the ones above are bent is itself fine, as is one that says nothing."""
    assert read_arrays(with_header({"a": ENTRY, "__metadata__": {"x": "y"}}), "there")["a"].tolist() == [0.0, 0.0]
    assert read_arrays(with_header("{}"), "there") == {}


@pytest.mark.parametrize("size", [65, 2**32, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(size: int) -> None:
    """The stated length is checked before anything of that length is read."""
    with pytest.raises(VerificationFailed, match=f"the header claims {size:,} bytes"):
        read_arrays(memoryview(struct.pack("<Q", size) + b"{}".ljust(64)), "there")


def test_a_header_past_the_limit_is_refused() -> None:
    """Sixteen mebibytes of header are no header of ours: they are not parsed."""
    with pytest.raises(VerificationFailed, match="the header claims 16,777,217 bytes"):
        read_arrays(with_header(b"{}".ljust(MAX_HEADER + 1)), "there")
    assert read_arrays(with_header(b"{}".ljust(MAX_HEADER)), "there") == {}


def read_or_refused(data: bytes) -> Arrays | None:
    """The arrays, or None where the reader refused; anything else is a crash."""
    try:
        return read_arrays(memoryview(data), "there")
    except VerificationFailed:
        return None


def touched(arrays: Arrays) -> int:
    """Read every byte: a view outside the file would show."""
    return sum(int(np.frombuffer(array.tobytes(), np.uint8).sum()) for array in arrays.values())


SOUND = written(SAMPLE)
BITS = st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255))


@given(changes=st.lists(BITS, min_size=1, max_size=6), length=st.integers(0, len(SOUND)) | st.just(len(SOUND)))
@example(changes=[(7, 255)], length=len(SOUND))
@example(changes=[(0, 0)], length=8)
def test_damaged_bytes_never_crash_the_reader(changes: list[tuple[int, int]], length: int) -> None:
    """Bytes overwritten anywhere, the end cut off: read within the file, or refused."""
    data = bytearray(SOUND)
    for position, value in changes:
        data[position] = value
    found = read_or_refused(bytes(data[:length]))
    if found is not None:
        touched(found)
        assert all(array.nbytes <= length for array in found.values())


NUMBERS = st.integers(-3, 80) | st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "BF16", ""]) | NUMBERS,
        "shape": st.lists(st.integers(-1, 9) | NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(st.integers(-1, 70) | NUMBERS, min_size=1, max_size=3) | NUMBERS,
    },
)
JSON = st.recursive(NUMBERS, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part))


@given(header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=3) | JSON)
def test_headers_of_any_content_never_crash_the_reader(header: Any) -> None:
    """Any JSON for a header: arrays within the data, or refused."""
    found = read_or_refused(bytes(with_header(json.dumps(header))))
    if found is not None:
        touched(found)
        assert all(array.nbytes <= 64 for array in found.values())


@given(text=st.binary(max_size=80))
def test_files_of_any_bytes_never_crash_the_reader(text: bytes) -> None:
    """Any bytes for a file, and any bytes for a header."""
    read_or_refused(text)
    read_or_refused(bytes(with_header(text)))
