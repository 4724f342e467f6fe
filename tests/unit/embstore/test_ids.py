"""Id spaces: stored arrays that do not fit are refused, and what callers give as ids is taken or named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embstore.errors import VerificationFailed
from embstore.hashing import bucket
from embstore.ids import Dense, Int64Vocabulary, StringVocabulary, Vocabulary, as_int64, id_space

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1
INT64 = st.integers(LOWEST, HIGHEST) | st.sampled_from([LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST - 1, HIGHEST])
TEXT = st.text(st.characters(exclude_categories=())) | st.text("ab\0", max_size=20)  # surrogates and NULs too
INT_KEYS = st.lists(INT64, min_size=1, max_size=60, unique=True)
TEXT_KEYS = st.lists(TEXT, min_size=1, max_size=60, unique=True)


def int_arrays(**changes: Any) -> dict[str, Any]:
    arrays = Vocabulary.from_ids([10, 20, 30]).arrays() | {f"ids.{k}": v for k, v in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def str_arrays(**changes: Any) -> dict[str, Any]:
    arrays = Vocabulary.from_ids(["ab", "c", "def"]).arrays() | {f"ids.{k}": v for k, v in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


SLOTS = np.full((12, 1), -1, np.int32)


@pytest.mark.parametrize(
    ("kind", "num_ids", "arrays"),
    [
        ("int64", 3, int_arrays(keys=None)),
        ("int64", 3, int_arrays(slots=None)),
        ("int64", 3, int_arrays(keys=np.zeros(3, np.int32))),
        ("int64", 3, int_arrays(keys=np.zeros((3, 1), np.int64))),
        ("int64", 3, int_arrays(keys=np.zeros(2, np.int64))),
        ("int64", 2, int_arrays(slots=SLOTS)),
        ("int64", 4, int_arrays()),
        ("int64", 3, int_arrays(slots=SLOTS.astype(np.int64))),
        ("int64", 3, int_arrays(slots=SLOTS[:, 0])),
        ("int64", 3, int_arrays(slots=SLOTS[:3])),
        ("int64", 3, int_arrays(slots=SLOTS[:0])),
        ("int64", 3, int_arrays(slots=SLOTS[:, :0])),
        ("int64", 3, int_arrays(slots=np.repeat(SLOTS, 2, axis=1))),
        ("int64", 3, int_arrays(slots=SLOTS + 4)),
        ("int64", 3, int_arrays(slots=SLOTS - 1)),
        ("int64", 3, str_arrays()),
        ("string", 3, int_arrays()),
        ("string", 3, str_arrays(bytes=None)),
        ("string", 3, str_arrays(offsets=None)),
        ("string", 3, str_arrays(slots=SLOTS + 4)),
        ("string", 3, str_arrays(bytes=np.zeros(6, np.int8))),
        ("string", 3, str_arrays(bytes=np.zeros(5, np.uint8))),
        ("string", 3, str_arrays(offsets=np.array([0, 2, 3, 6], np.int32))),
        ("string", 3, str_arrays(offsets=np.array([1, 2, 3, 6], np.uint32))),
        ("string", 3, str_arrays(offsets=np.array([0, 2, 3, 7], np.uint32))),
        ("string", 3, str_arrays(offsets=np.array([0, 7, 3, 6], np.uint32))),
        ("string", 3, str_arrays(offsets=np.array([0, -1, 3, 6], np.int64))),
        ("string", 3, str_arrays(offsets=np.array([0, 3, 6], np.uint32))),
        ("string", 3, str_arrays(offsets=np.zeros(0, np.uint32))),
        ("string", 2, str_arrays(slots=SLOTS)),
        ("float", 3, {}),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(kind: str, num_ids: int, arrays: dict[str, Any]) -> None:
    """A missing, mistyped, misshapen or out-of-range array is found before the first lookup."""
    with pytest.raises(VerificationFailed, match=f"id space '?{kind}"):
        id_space(kind, num_ids, arrays)


@pytest.mark.parametrize("num_ids", [1, 2, 1000, 2**31, 2**62, HIGHEST])
def test_dense_ids_are_their_rows(num_ids: int) -> None:
    """Ids in `[0, num_ids)` are rows, all others are missing, at either end of int64."""
    inside = sorted({0, num_ids // 2, num_ids - 1})
    space = id_space("dense", num_ids, {})
    rows, missing = space.rows(inside)
    assert (rows.tolist(), missing) == (inside, 0)
    outside = [-1, LOWEST, *([num_ids, HIGHEST] if num_ids < HIGHEST else [])]
    rows, missing = space.rows([*outside, *inside])
    assert (rows.tolist(), missing) == ([-1] * len(outside) + inside, len(outside))
    assert (space.arrays(), space.num_bytes(), space.ids_of(np.array(inside))) == ({}, 0, inside)


def test_dense_rows_leave_the_callers_ids_alone() -> None:
    """Ids in range are not copied; with a missing one among them the caller's array stays as it was."""
    ids = np.array([0, 5, 2])
    assert Dense(6).rows(ids)[0] is ids
    assert Dense(5).rows(ids)[0].tolist() == [0, -1, 2]
    assert ids.tolist() == [0, 5, 2]


@given(keys=st.lists(INT64, max_size=30), num_rows=st.integers(1, 1 << 30))
def test_hashed_rows_of_integers_are_their_buckets(keys: list[int], num_rows: int) -> None:
    """Policy `hash` gives any integer a row in range, the bucket of its hash, whatever the id space."""
    expected = bucket(np.array(keys, np.int64), num_rows).tolist()
    assert all(0 <= row < num_rows for row in expected)
    assert Dense(5).hashed_rows(keys, num_rows).tolist() == expected
    assert Int64Vocabulary.build(np.array([1])).hashed_rows(keys, num_rows).tolist() == expected


@given(keys=st.lists(TEXT, max_size=30), num_rows=st.integers(1, 1 << 30))
def test_hashed_rows_of_strings_are_in_range_and_their_own(keys: list[str], num_rows: int) -> None:
    """Policy `hash` gives any string a row in range that depends on nothing but the string."""
    space = StringVocabulary.build(["x"])
    rows = space.hashed_rows(keys, num_rows).tolist()
    assert all(0 <= row < num_rows for row in rows)
    other = StringVocabulary.build(["a", "b", "c"])
    assert rows == [int(other.hashed_rows([key], num_rows)[0]) for key in keys]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.uint64, ">i8"])
def test_every_integer_type_is_taken(dtype: Any) -> None:
    """Integers of any width and byte order become the same int64 ids."""
    found = as_int64(np.array([1, 127, 0], dtype))
    assert found.dtype == np.int64
    assert found.tolist() == [1, 127, 0]


@pytest.mark.parametrize("empty", [[], (), np.array([], np.int64), np.array([], np.int32)], ids=repr)
def test_no_ids_are_ids(empty: Any) -> None:
    """An empty batch is an int64 array of nothing, and finds nothing."""
    assert as_int64(empty).dtype == np.int64
    assert as_int64(empty).shape == (0,)
    for space in (Dense(3), Vocabulary.from_ids([4])):
        rows, missing = space.rows(empty)
        assert (rows.shape, missing) == ((0,), 0)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (np.array([2**63], np.uint64), "signed 64-bit"),
        ([2**63], "signed 64-bit"),
        ([0, 2**64 - 1], "float64"),
        ([2**70], "object"),
        ([-1, 2**63], "float64"),
        ([1.0], "float64"),
        ([1, 2.5], "float64"),
        ([float("nan")], "float64"),
        (np.array([], np.float32), "float32"),
        ([True, False], "bool"),
        (["1"], "<U1"),
        ([None], "object"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[1], [2, 3]], "one-dimensional"),
        (np.zeros((0, 2), np.int64), r"shape \(0, 2\)"),
        (5, r"shape \(\)"),
        ("12", r"shape \(\)"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
    ],
    ids=repr,
)
def test_what_is_no_id_is_a_type_error(keys: Any, named: str) -> None:
    """Nothing is rounded, wrapped or guessed into an id; the message names what came."""
    with pytest.raises(TypeError, match=named):
        as_int64(keys)
    for space in (Dense(10), Vocabulary.from_ids([1])):
        with pytest.raises(TypeError, match=named):
            space.rows(keys)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ([1], "int"),
        (["a", None], "NoneType"),
        (["a", b"b"], "bytes"),
        ([["a"]], "list"),
        (np.array([1, 2]), "int64"),
        ("ab", "one string"),
    ],
    ids=repr,
)
def test_what_is_no_string_is_a_type_error(keys: Any, named: str) -> None:
    """A string vocabulary takes sequences of strings only; a lone string is not a batch of letters."""
    space = Vocabulary.from_ids(["a", "b"])
    with pytest.raises(TypeError, match=named):
        space.rows(keys)
    with pytest.raises(TypeError, match=named):
        space.hashed_rows(keys, 10)


def test_ids_may_be_read_only_strided_or_unaligned() -> None:
    """Ids straight from a request body, or every other element of an array, are looked up where they lie."""
    body = memoryview(b"\x00" + np.array([30, 10, 99], np.int64).tobytes())
    unaligned = np.frombuffer(body, np.int64, 3, 1)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    space = Vocabulary.from_ids([10, 20, 30])
    assert space.rows(unaligned)[0].tolist() == [2, 0, -1]
    assert Dense(50).rows(unaligned)[0].tolist() == [30, 10, -1]
    strided = np.array([10, 0, 20, 0, 30])[::2]
    assert space.rows(strided)[0].tolist() == [0, 1, 2]
