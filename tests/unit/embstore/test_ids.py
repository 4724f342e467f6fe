"""Every id finds its own row and no other: dense ids, integer vocabularies, string vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.errors import DataError, VerificationFailed
from embstore.hashing import GAMMA, bucket, to_signed
from embstore.ids import Dense, IdSpace, Int64Vocabulary, StringVocabulary, Vocabulary, as_int64, id_space

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1
INT64 = st.integers(LOWEST, HIGHEST) | st.sampled_from([LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST - 1, HIGHEST])
TEXT = st.text(st.characters(exclude_categories=())) | st.text("ab\0", max_size=20)  # surrogates and NULs too
INT_KEYS = st.lists(INT64, min_size=1, max_size=60, unique=True)
TEXT_KEYS = st.lists(TEXT, min_size=1, max_size=60, unique=True)


def reread(space: IdSpace) -> IdSpace:
    """The space that a reader of its stored arrays gets; the arrays are read-only, as mapped files are."""
    arrays = {name: array.copy() for name, array in space.arrays().items()}
    for array in arrays.values():
        array.flags.writeable = False
    return id_space(space.kind, space.num_ids, arrays)


def check_rows(space: IdSpace, keys: Sequence[Any], strangers: Sequence[Any]) -> None:
    """Keys have the rows they were given in, strangers have none, mixed in any order."""
    rows, missing = space.rows(list(keys))
    assert rows.dtype == np.int64
    assert (rows.tolist(), missing) == (list(range(len(keys))), 0)
    mixed = [*strangers, *reversed(keys), *strangers]
    expected = [-1] * len(strangers) + list(range(len(keys)))[::-1] + [-1] * len(strangers)
    rows, missing = space.rows(mixed)
    assert (rows.tolist(), missing) == (expected, 2 * len(strangers))


@given(keys=INT_KEYS, others=st.lists(INT64, max_size=20))
@example(keys=[HIGHEST, LOWEST, 0, -1], others=[HIGHEST - 1, LOWEST + 1, 1])
def test_integer_keys_have_their_row_and_strangers_none(keys: list[int], others: list[int]) -> None:
    """Any int64 keys map to their positions, before and after storing; unknown ones to -1."""
    space = Vocabulary.from_ids(keys)
    assert (space.kind, space.num_ids) == ("int64", len(keys))
    strangers = [key for key in others if key not in set(keys)]
    for reader in (space, reread(space)):
        check_rows(reader, keys, strangers)
        assert reader.ids_of(np.arange(len(keys))) == keys


@given(keys=TEXT_KEYS, others=st.lists(TEXT, max_size=20))
@example(keys=["", "\0", "\0\0", "a", "a\0", "\0a", "aa"], others=["a\0\0", "b"])
@example(keys=["\ud800", "\ud83d\ude00", "😀", "é", "e\u0301"], others=["\udc00", "e", "\u0301"])
@example(keys=["1234567", "12345678", "123456789", "1234567812345678"], others=["123456781", "12345678\0"])
def test_string_keys_have_their_row_and_strangers_none(keys: list[str], others: list[str]) -> None:
    """Any strings map to their positions, before and after storing: empty, with NULs, with lone surrogates."""
    space = Vocabulary.from_ids(keys)
    assert (space.kind, space.num_ids) == ("string", len(keys))
    strangers = [key for key in others if key not in set(keys)]
    for reader in (space, reread(space)):
        check_rows(reader, keys, strangers)
        assert reader.ids_of(np.arange(len(keys))) == keys


@pytest.mark.parametrize("batch", [0, 1, 7, 8, 9, 17, 1000])
def test_batches_of_any_size_are_found_whole(batch: int) -> None:
    """The probing runs some keys ahead of itself: no batch length loses its first or last keys."""
    keys = np.arange(1000) * 977 - 500
    space = Vocabulary.from_ids(keys)
    wanted = keys[::-1][:batch]
    rows, missing = space.rows(wanted)
    assert (rows.tolist(), missing) == (list(range(999, 999 - batch, -1)), 0)
    rows, missing = space.rows(wanted + 1)
    assert (rows.tolist(), missing) == ([-1] * batch, batch)


def test_integer_keys_that_share_a_slot_stay_apart() -> None:
    """A hundred keys whose first slot is the last of the table wrap around, and are still told from their like."""
    num_keys, capacity = 100, 158
    crowd = np.arange(60_000)
    crowd = crowd[bucket(crowd, capacity) == capacity - 1]
    keys, strangers = crowd[:num_keys].tolist(), crowd[num_keys:].tolist()
    assert len(strangers) > 100
    space = Vocabulary.from_ids(keys)
    assert len(space.arrays()["ids.slots"]) == capacity
    check_rows(space, keys, strangers)


def test_string_keys_that_share_a_slot_stay_apart() -> None:
    """Strings that all hash to one slot are told apart by their bytes."""
    num_keys, capacity = 30, 53
    words = [f"word {i}" for i in range(8000)]
    hashes = paper_hashes(words)
    crowd = [w for w, h in zip(words, hashes, strict=True) if first_slot(h, capacity) == capacity - 1]
    keys, strangers = crowd[:num_keys], crowd[num_keys:]
    assert len(strangers) > 50
    space = Vocabulary.from_ids(keys)
    slots = space.arrays()["ids.slots"][:, 0]
    assert len(slots) == capacity
    assert slots[-1] == 0
    assert slots[: num_keys - 1].tolist() == list(range(1, num_keys))
    check_rows(space, keys, strangers)


def paper_mix(word: int) -> int:
    """splitmix64 with seed 0 in integers without limits."""
    z = (word + GAMMA) % (1 << 64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return z ^ (z >> 31)


def paper_hashes(strings: Sequence[str]) -> list[int]:
    """The length, then eight bytes at a time, little-endian, through the mixer; as int64."""

    def one(data: bytes) -> int:
        hashed = paper_mix(len(data))
        for at in range(0, len(data), 8):
            hashed = paper_mix(hashed ^ int.from_bytes(data[at : at + 8], "little"))
        return to_signed(hashed)

    return [one(s.encode("utf-8", "surrogatepass")) for s in strings]


def first_slot(hashed: int, capacity: int) -> int:
    """The hash's high half as a fraction of the capacity."""
    return (hashed % (1 << 64) >> 32) * capacity >> 32


@given(st.lists(TEXT, max_size=20))
def test_strings_hash_as_on_paper(strings: list[str]) -> None:
    """The compiled string hash equals integer maths: stored slots depend on it."""
    expected = bucket(np.array(paper_hashes(strings), np.int64), 1 << 30)
    space = StringVocabulary.build(["anything"])
    np.testing.assert_array_equal(space.hashed_rows(strings, 1 << 30), expected)


def test_golden_vocabularies() -> None:
    """Slots as published files hold them: a later release must find these keys there."""
    strings = Vocabulary.from_ids(["", "item-1", "item-2", "ключ", "a longer key than eight bytes"])
    assert strings.arrays()["ids.slots"][:, 0].tolist() == [-1, -1, 4, 2, -1, -1, -1, -1, 3, -1, -1, -1, -1, 0, 1]
    integers = Vocabulary.from_ids([10, -3, 2**40, HIGHEST, LOWEST])
    assert integers.arrays()["ids.slots"][:, 0].tolist() == [0, 2, 3, -1, 4, -1, -1, -1, -1, -1, -1, -1, -1, -1, 1]


@pytest.mark.parametrize("keys", [[7, 3, 7 + (1 << 40)], ["x", "eight by", "more than eight", "ключ", ""]], ids=repr)
def test_slots_are_as_on_paper(keys: list[Any]) -> None:
    """A key lies in the first free slot from the one its hash points at, keys entered in row order."""
    hashes = paper_hashes(keys) if isinstance(keys[0], str) else [paper_mix(key) for key in keys]
    expected = [-1] * (len(keys) * 3 // 2 + 8)
    for row, hashed in enumerate(hashes):
        at = first_slot(hashed, len(expected))
        while expected[at] >= 0:
            at = (at + 1) % len(expected)
        expected[at] = row
    assert Vocabulary.from_ids(keys).arrays()["ids.slots"][:, 0].tolist() == expected


@pytest.mark.parametrize("keys", [[5, 1, 5], ["x", "y", "", "x"], [LOWEST, LOWEST], ["", ""]])
def test_a_duplicate_key_is_refused_by_name(keys: list[Any]) -> None:
    """One key cannot have two rows; the message says which key."""
    twice = next(key for key in keys if keys.count(key) == 2)
    with pytest.raises(DataError, match=rf"^id {twice!r} is in the vocabulary twice$"):
        Vocabulary.from_ids(keys)


@pytest.mark.parametrize(
    "keys",
    [
        [1, "a"],
        ["a", 1],
        ["a", None],
        ["a", b"b"],
        [1.0, 2.0],
        [1, None],
        [True, False],
        [2**63],
        [-(2**63) - 1],
        [2**70],
        [[1], [2, 3]],
        ["a", ["b"]],
        np.zeros((2, 2), np.int64),
        np.array([["a", "b"]]),
        np.array([2**63], np.uint64),
        "abc",
    ],
    ids=repr,
)
def test_what_cannot_be_keys_is_a_data_error(keys: Any) -> None:
    """Keys are all 64-bit integers or all strings, in one dimension."""
    with pytest.raises(DataError, match="all integers or all strings"):
        Vocabulary.from_ids(keys)


def test_keys_may_come_as_arrays() -> None:
    """numpy arrays of strings, objects and every integer type build the vocabulary their lists do."""
    for array in (np.array(["x", "yy"]), np.array(["x", "yy"], object), ("x", "yy")):
        assert Vocabulary.from_ids(array).ids_of(np.arange(2)) == ["x", "yy"]
    for dtype in (np.uint8, np.int16, np.uint32, np.uint64, ">i8"):
        assert Vocabulary.from_ids(np.array([7, 3], dtype)).ids_of(np.arange(2)) == [7, 3]


def test_one_long_key_costs_its_own_bytes_only() -> None:
    """Many short keys beside one of a megabyte: nothing is padded to the longest."""
    keys = [f"k{i}" for i in range(20_000)] + ["x" * 1_000_000]
    space = Vocabulary.from_ids(keys)
    assert space.rows([keys[-1], "k7", "x" * 999_999])[0].tolist() == [20_000, 7, -1]


@pytest.mark.parametrize("num_keys", [1, 2, 3, 1000])
def test_bytes_per_key_are_the_stated_ones(num_keys: int) -> None:
    """14 bytes per integer key; 10 and the UTF-8 length per string key; a few tens of bytes beyond."""
    integers = Vocabulary.from_ids(np.arange(num_keys))
    slots = 4 * (num_keys * 3 // 2 + 8)
    assert integers.num_bytes() == 8 * num_keys + slots
    assert 0 <= integers.num_bytes() - 14 * num_keys <= 32
    keys = [f"ключ {i}" for i in range(num_keys)]
    strings = Vocabulary.from_ids(keys)
    utf8 = sum(len(key.encode()) for key in keys)
    assert strings.num_bytes() == utf8 + 4 * (num_keys + 1) + slots
    assert 0 <= strings.num_bytes() - 10 * num_keys - utf8 <= 36


@given(keys=INT_KEYS, data=st.data())
def test_damaged_integer_slots_never_give_a_wrong_row(keys: list[int], data: st.DataObject) -> None:
    """Whatever the slots say, a key gets its own row or none, and the search ends."""
    space = Vocabulary.from_ids(keys)
    arrays = damaged(space, data)
    rows, missing = id_space("int64", len(keys), arrays).rows(keys)
    assert all(row in (-1, i) for i, row in enumerate(rows.tolist()))
    assert missing == (rows < 0).sum()


@given(keys=TEXT_KEYS, data=st.data())
def test_damaged_string_slots_never_give_a_wrong_row(keys: list[str], data: st.DataObject) -> None:
    """The same for strings."""
    space = Vocabulary.from_ids(keys)
    arrays = damaged(space, data)
    rows, missing = id_space("string", len(keys), arrays).rows(keys)
    assert all(row in (-1, i) for i, row in enumerate(rows.tolist()))
    assert missing == (rows < 0).sum()


def damaged(space: IdSpace, data: st.DataObject) -> dict[str, NDArray[Any]]:
    """The space's arrays with arbitrary slots of the range a reader accepts; none may be free."""
    arrays = dict(space.arrays())
    size = len(arrays["ids.slots"])
    slot = st.integers(data.draw(st.sampled_from([-1, 0])), space.num_ids - 1)
    slots = data.draw(st.lists(slot, min_size=size, max_size=size))
    return arrays | {"ids.slots": np.array(slots, np.int32)[:, None]}


def test_a_table_without_a_free_slot_ends_the_search() -> None:
    """A full table of slots is searched once around, then the key is missing."""
    keys = np.arange(50)
    arrays = dict(Vocabulary.from_ids(keys).arrays())
    full = id_space("int64", 50, arrays | {"ids.slots": np.zeros_like(arrays["ids.slots"])})
    assert full.rows([0, 1, 49, 1000])[0].tolist() == [0, -1, -1, -1]


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


def test_wide_offsets_are_read_too() -> None:
    """Offsets of 8 bytes, as vocabularies past 4 GiB of text store them, find the same keys."""
    narrow = str_arrays()
    wide = narrow | {"ids.offsets": narrow["ids.offsets"].astype(np.int64)}
    space = id_space("string", 3, wide)
    check_rows(space, ["ab", "c", "def"], ["", "a", "cd"])
    assert space.ids_of(np.array([2, 0])) == ["def", "ab"]


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
