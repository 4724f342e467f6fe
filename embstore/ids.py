"""Id spaces: from the ids that callers use to the rows that schemes know, `0 .. num_ids - 1`.

* `Dense`: the ids are the rows. Nothing stored.
* `Int64Vocabulary`: any 64-bit integers. 14 bytes per id: the id (8) and 1.5 slots of 4 bytes.
* `StringVocabulary`: any strings. 10 bytes per id (an offset, 1.5 slots) and the string's UTF-8 bytes.

An id that is not there gets row -1, never another id's row; what to serve for it is the caller's policy.
All of it is plain arrays, stored with the version, mapped from disk as they are: loading builds nothing.
"""

# Shapes: B ids in a batch, N ids of the space, C slots of the hash table (1.5 N).

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from embstore.errors import DataError, VerificationFailed
from embstore.hashing import bucket

Int64s = NDArray[np.int64]
Ids = Sequence[int] | Sequence[str] | NDArray[Any]
PREFIX = "ids."
_INT64 = np.dtype(np.int64)


class IdSpace:
    """A fixed set of ids, each with its row."""

    kind: ClassVar[str]
    id_type: ClassVar[type]
    num_ids: int

    def rows(self, ids: Ids) -> tuple[Int64s, int]:
        """Rows of B ids, int64 [B] with -1 where missing, and how many are missing."""
        raise NotImplementedError

    def hashed_rows(self, ids: Ids, num_rows: int) -> Int64s:
        """A row in `[0, num_rows)` for any ids at all, the same in every process: policy `hash`. Here for integers."""
        return bucket(as_int64(ids), num_rows)

    def ids_of(self, rows: Int64s) -> list[int] | list[str]:
        """The ids of these rows."""
        raise NotImplementedError

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is stored with a version, by name."""
        return {}

    def num_bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(array.nbytes for array in self.arrays().values())


@dataclass(frozen=True)
class Dense(IdSpace):
    """Ids are `0 .. num_ids - 1` and are their own rows."""

    num_ids: int
    kind: ClassVar[str] = "dense"
    id_type: ClassVar[type] = int

    def rows(self, ids: Ids) -> tuple[Int64s, int]:
        """The ids themselves when all are in range (no copy)."""
        rows_B = as_int64(ids)
        missing = int(_kernels().count_outside(rows_B, self.num_ids))
        if missing:
            rows_B = np.where((rows_B >= 0) & (rows_B < self.num_ids), rows_B, -1)
        return rows_B, missing

    def ids_of(self, rows: Int64s) -> list[int]:
        """The rows."""
        return [int(row) for row in rows]


class Vocabulary(IdSpace):
    """Ids in row order with a hash table over them."""

    SLOTS_PER_ID: ClassVar[float] = 1.5

    @staticmethod
    def from_ids(ids: Ids) -> Vocabulary:
        """The vocabulary in which `ids[i]` is row i: int64 or string, by the ids.

        DataError on duplicates, and on ids that are neither all 64-bit integers nor all strings.
        """
        listed: Any = ids.tolist() if isinstance(ids, np.ndarray) and ids.dtype.kind not in "iu" else ids
        if not isinstance(listed, str | np.ndarray) and all(isinstance(one, str) for one in listed):
            return StringVocabulary.build(listed)
        try:
            return Int64Vocabulary.build(as_int64(listed))
        except TypeError as error:
            raise DataError(f"vocabulary ids must be all integers or all strings: {error}") from error

    @classmethod
    def _empty_slots(cls, num_ids: int) -> NDArray[np.int32]:
        if num_ids >= 1 << 31:
            raise DataError(f"a vocabulary holds fewer than 2**31 ids, got {num_ids:,}")
        return np.full((int(num_ids * cls.SLOTS_PER_ID) + 8, 1), -1, np.int32)


@dataclass(frozen=True, eq=False)
class Int64Vocabulary(Vocabulary):
    """Any int64 ids: they themselves [N] in row order, slots [C, 1] of row numbers."""

    ids_N: Int64s
    slots_C1: NDArray[np.int32]
    kind: ClassVar[str] = "int64"
    id_type: ClassVar[type] = int

    @property
    def num_ids(self) -> int:  # type: ignore[override]
        """Ids in the vocabulary."""
        return len(self.ids_N)

    @classmethod
    def build(cls, ids: Int64s) -> Int64Vocabulary:
        """Hash the ids; DataError on a duplicate."""
        slots, duplicate = cls._empty_slots(len(ids)), np.empty(1, np.int64)
        _kernels().fill_int64(ids, slots, duplicate)
        if duplicate[0] >= 0:
            raise DataError(f"id {int(ids[duplicate[0]])} is in the vocabulary twice")
        return cls(ids, slots)

    def rows(self, ids: Ids) -> tuple[Int64s, int]:
        """One probe sequence per id."""
        wanted = as_int64(ids)
        rows = np.empty(len(wanted), np.int64)
        missing = _kernels().find_int64(self.ids_N, self.slots_C1, wanted, rows)
        return rows, int(missing)

    def ids_of(self, rows: Int64s) -> list[int]:
        """Ids by row."""
        return [int(one) for one in self.ids_N[rows]]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Ids and slots."""
        return {PREFIX + "keys": self.ids_N, PREFIX + "slots": self.slots_C1}


@dataclass(frozen=True, eq=False)
class StringVocabulary(Vocabulary):
    """Any strings: their UTF-8 bytes one after the other, offsets [N + 1], slots [C, 1] of row numbers."""

    data: NDArray[np.uint8]
    offsets: NDArray[Any]
    slots_C1: NDArray[np.int32]
    kind: ClassVar[str] = "string"
    id_type: ClassVar[type] = str

    @property
    def num_ids(self) -> int:  # type: ignore[override]
        """Ids in the vocabulary."""
        return len(self.offsets) - 1

    @classmethod
    def build(cls, ids: Sequence[str]) -> StringVocabulary:
        """Hash the ids; DataError on a duplicate."""
        data, offsets = _pack(ids)
        stored: NDArray[Any] = offsets.astype(np.uint32) if len(data) < 1 << 32 else offsets
        slots, duplicate = cls._empty_slots(len(ids)), np.empty(1, np.int64)
        _kernels().fill_string(data, stored, slots, duplicate)
        if duplicate[0] >= 0:
            raise DataError(f"id {ids[int(duplicate[0])]!r} is in the vocabulary twice")
        return cls(data, stored, slots)

    def rows(self, ids: Ids) -> tuple[Int64s, int]:
        """One probe sequence per id, compared byte by byte."""
        wanted, wanted_offsets = _pack(ids)
        rows = np.empty(len(wanted_offsets) - 1, np.int64)
        missing = _kernels().find_string(self.data, self.offsets, self.slots_C1, wanted, wanted_offsets, rows)
        return rows, int(missing)

    def hashed_rows(self, ids: Ids, num_rows: int) -> Int64s:
        """Hash of the id's bytes."""
        data, offsets = _pack(ids)
        hashes = np.empty(len(offsets) - 1, np.int64)
        _kernels().hash_strings(data, offsets, hashes)
        return bucket(hashes, num_rows)

    def ids_of(self, rows: Int64s) -> list[str]:
        """Ids by row."""
        data = self.data.tobytes()
        return [data[int(self.offsets[r]) : int(self.offsets[r + 1])].decode("utf-8", "surrogatepass") for r in rows]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Bytes, offsets and slots."""
        return {PREFIX + "bytes": self.data, PREFIX + "offsets": self.offsets, PREFIX + "slots": self.slots_C1}


@cache
def _kernels() -> ModuleType:
    """Compiled loops, loaded when they are first needed."""
    return import_module("embstore.kernels.cpu.ids")


def as_int64(ids: Ids) -> Int64s:
    """Integer ids as a contiguous int64 [B]; TypeError names what came instead."""
    if type(ids) is np.ndarray and ids.dtype is _INT64 and ids.ndim == 1 and ids.flags.c_contiguous:
        return ids
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"ids must be one-dimensional: {error}") from error
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype == np.int64 and array.ndim == 1 and array.flags.c_contiguous:
        return array
    if array.ndim != 1:
        raise TypeError(f"ids must be one-dimensional, got shape {array.shape}")
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids must be 64-bit integers, got {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.uint64((1 << 63) - 1):
        raise TypeError("ids must fit a signed 64-bit integer")
    return np.ascontiguousarray(array, np.int64)


def _pack(ids: Ids) -> tuple[NDArray[np.uint8], Int64s]:
    """Strings as UTF-8 bytes and offsets; TypeError names what came instead."""
    if isinstance(ids, str):
        raise TypeError("ids must be a sequence of strings, got one string")
    try:
        encoded = [one.encode("utf-8", "surrogatepass") for one in ids]  # type: ignore[union-attr]
    except AttributeError:
        bad = next(one for one in ids if not isinstance(one, str))
        raise TypeError(f"ids must be strings, got {type(bad).__name__}") from None
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def id_space(kind: str, num_ids: int, arrays: Mapping[str, NDArray[Any]]) -> IdSpace:
    """The id space a manifest describes, over stored arrays; VerificationFailed when they do not fit together."""

    def stored(name: str, ndim: int, *dtypes: type) -> NDArray[Any]:
        array = arrays.get(PREFIX + name)
        if array is None or array.ndim != ndim or array.dtype not in [np.dtype(t) for t in dtypes]:
            raise VerificationFailed(f"id space {kind!r}: array {PREFIX + name!r} is missing or of the wrong type")
        return array

    def slots() -> NDArray[np.int32]:
        found = stored("slots", 2, np.int32)
        if len(found) <= num_ids or found.shape[1] != 1 or found.max() >= num_ids or found.min() < -1:
            raise VerificationFailed(f"id space {kind!r}: slots do not fit {num_ids:,} ids")
        return found

    space: IdSpace
    if kind == Dense.kind:
        return Dense(num_ids)
    if kind == Int64Vocabulary.kind:
        space = Int64Vocabulary(stored("keys", 1, np.int64), slots())
    elif kind == StringVocabulary.kind:
        data, offsets = stored("bytes", 1, np.uint8), stored("offsets", 1, np.uint32, np.int64)
        ends = offsets.astype(np.int64)
        if len(ends) == 0 or ends[0] != 0 or ends[-1] != len(data) or (np.diff(ends) < 0).any():
            raise VerificationFailed("id space 'string': offsets do not fit the ids' bytes")
        space = StringVocabulary(data, offsets, slots())
    else:
        raise VerificationFailed(f"unknown id space {kind!r}: this version reads dense, int64 and string")
    if space.num_ids != num_ids:
        raise VerificationFailed(f"id space {kind!r} holds {space.num_ids:,} ids, the manifest says {num_ids:,}")
    return space
