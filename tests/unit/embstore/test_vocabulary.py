"""Vocabularies: every id finds its own row and no other, from slots that a later release must read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from embstore.errors import DataError
from embstore.hashing import GAMMA, bucket, to_signed
from embstore.ids import IdSpace, StringVocabulary, Vocabulary, id_space

pytestmark = pytest.mark.slow

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
    """Whatever the slots of a string vocabulary say, an id gets its own row or none, and the search ends."""
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


def test_wide_offsets_are_read_too() -> None:
    """Offsets of 8 bytes, as vocabularies past 4 GiB of text store them, find the same keys."""
    narrow = Vocabulary.from_ids(["ab", "c", "def"]).arrays()
    wide = narrow | {"ids.offsets": narrow["ids.offsets"].astype(np.int64)}
    space = id_space("string", 3, wide)
    check_rows(space, ["ab", "c", "def"], ["", "a", "cd"])
    assert space.ids_of(np.array([2, 0])) == ["def", "ab"]
