"""Rows of one version of one table by id, in a fixed number of bytes: which of them stay is decided by how often asked.

A set-associative table: an id can be in one of the 8 slots of its set. When they are full, the id that was asked for
least often among the 8 goes, and only for one that was asked for more often (TinyLFU's admission). Ids that are in
have a counter of their own; the others are counted in a count-min sketch. Counters are halved after a while, so
that what was hot makes room for what is. Everything is done for a batch of ids at a time. Not thread-safe.

Shapes: n ids, s sets, w ways (slots of a set), p bytes of a row, m ids that are to be put in.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WAYS = 8
_SKETCH_ROWS, _SKETCH_WIDTH = 4, 3
"""Of the sketch: counters of an id, and columns for each slot."""
SLOT_BYTES = 8 + 1 + 4 + _SKETCH_ROWS * _SKETCH_WIDTH
"""What a slot takes beside its row: an id, a counter, the row's number, its part of the sketch."""
OVERHEAD_BYTES = 2048
"""The Python objects of one table."""
_MAX_COUNT = 255
_AGE_AFTER = 15  # lookups of ids a slot, until counters are halved
_ROUNDS = 4
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MIX_SKETCH = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
Int64s = NDArray[np.int64]
Raw = NDArray[np.uint8]


class HotRows:
    """At most `num_bytes` of rows of `row_bytes` each, bookkeeping included; `num_bytes` must pass `fits`."""

    def __init__(self, num_bytes: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.num_sets = num_sets = _num_sets(num_bytes, row_bytes)
        num_slots = num_sets * WAYS
        self._num_sets = np.uint64(num_sets)
        self._ids_sw = np.zeros((num_sets, WAYS), np.int64)
        # An empty slot holds an id of another set, so that no id can be found there.
        home, other = int(self._sets_of(np.zeros(1, np.int64))[0]), 1
        while int(self._sets_of(np.array([other]))[0]) == home:
            other += 1
        self._ids_sw[home] = other
        self._counts_sw = np.zeros((num_sets, WAYS), np.uint8)
        """How often each slot's id was asked for; 0: the slot is empty."""
        self._ids, self._counts = self._ids_sw.reshape(-1), self._counts_sw.reshape(-1)
        # Rows fill up from the first on, so that memory is taken as it is needed, not all of it by the first ids.
        self._rows = np.empty((num_slots, row_bytes), np.uint8)
        self._row_of = np.zeros(num_slots, np.int32)
        self._num_rows = 0
        width = _SKETCH_WIDTH * num_slots
        self._width = np.uint64(width)
        self._sketch = np.zeros(_SKETCH_ROWS * width, np.uint8)
        self._sketch_rows = np.arange(_SKETCH_ROWS, dtype=np.uint64)
        self._until_aged = _AGE_AFTER * num_slots
        self.evictions = 0

    @staticmethod
    def fits(num_bytes: int, row_bytes: int) -> bool:
        """Whether rows of this size have room for at least two sets."""
        return _num_sets(num_bytes, row_bytes) >= 2

    @property
    def num_bytes(self) -> int:
        """What all of it takes."""
        arrays = (self._ids, self._counts, self._rows, self._row_of, self._sketch)
        return OVERHEAD_BYTES + sum(array.nbytes for array in arrays)

    def __len__(self) -> int:
        return self._num_rows

    def get(self, ids: Int64s) -> tuple[Int64s, Raw]:
        """Places in `ids` that are here, in order, and a copy of their rows; they count as asked for."""
        places, slots = self._find(ids)
        counts = self._counts[slots]
        self._counts[slots] = counts + (counts < _MAX_COUNT)
        self._until_aged -= len(ids)
        if self._until_aged <= 0:
            self._age()
        return places, self._rows.take(self._row_of[slots], axis=0)

    def put(self, ids: Int64s, rows: Raw) -> None:
        """Offers the rows of ids that were asked for, `[m]` and `[m, p]`; those asked for most often are taken."""
        ids, first = np.unique(ids, return_index=True)
        new = np.ones(len(ids), np.bool_)
        new[self._find(ids)[0]] = False
        ids, first = ids[new], first[new]
        asked = self._count_new(ids)
        order = np.argsort(asked, kind="stable")[::-1]  # of two ids of a set, the one asked for more often is first
        ids, first, asked, sets = ids[order], first[order], asked[order], self._sets_of(ids)[order]
        for _ in range(_ROUNDS):
            if not len(ids):
                return
            _, leading = np.unique(sets, return_index=True)
            self._place(ids[leading], sets[leading], asked[leading], rows, first[leading])
            left = np.ones(len(ids), np.bool_)
            left[leading] = False
            ids, first, asked, sets = ids[left], first[left], asked[left], sets[left]

    def _place(self, ids: Int64s, sets: Int64s, asked: NDArray[np.uint8], rows: Raw, first: Int64s) -> None:
        """Puts ids of different sets in the place of what was asked for less often."""
        counts = self._counts_sw[sets]
        ways = counts.argmin(axis=1)
        least = counts[np.arange(len(ways)), ways]
        admitted = asked > least
        slots = (sets * WAYS + ways)[admitted]
        full = least[admitted] > 0
        evicted, empty = slots[full], slots[~full]
        cells = self._cells(self._ids[evicted])
        self._sketch[cells] = np.maximum(self._sketch[cells], self._counts[evicted][:, None])
        self.evictions += len(evicted)
        self._row_of[empty] = np.arange(self._num_rows, self._num_rows + len(empty))
        self._num_rows += len(empty)
        self._ids[slots] = ids[admitted]
        self._counts[slots] = asked[admitted]
        self._rows[self._row_of[slots]] = rows[first[admitted]]

    def _find(self, ids: Int64s) -> tuple[Int64s, Int64s]:
        """Places in `ids` that are here, and their slots."""
        sets = self._sets_of(ids)
        here = np.flatnonzero(self._ids_sw.take(sets, axis=0) == ids[:, None])
        places = here // WAYS
        return places, sets[places] * WAYS + here % WAYS

    def _count_new(self, ids: Int64s) -> NDArray[np.uint8]:
        """Counts ids that are not here once more, `[m]`: how often each was asked for, or a little more."""
        cells = self._cells(ids)
        counts = self._sketch[cells]
        asked: NDArray[np.uint8] = np.minimum(counts.min(axis=1, initial=_MAX_COUNT), _MAX_COUNT - 1) + np.uint8(1)
        self._sketch[cells] = np.maximum(counts, asked[:, None])
        return asked

    def _age(self) -> None:
        self._counts[:] = np.maximum(self._counts >> 1, self._counts > 0)  # 0 would mean empty
        self._sketch >>= 1
        self._until_aged = _AGE_AFTER * len(self._ids)

    def _sets_of(self, ids: Int64s) -> Int64s:
        mixed = ids.view(np.uint64)
        mixed = (mixed ^ (mixed >> _HALF)) * _MIX
        return (((mixed >> _HALF) * self._num_sets) >> _HALF).view(np.int64)

    def _cells(self, ids: Int64s) -> Int64s:
        """Where in the sketch each id is counted, `[m, 4]`."""
        mixed = ids.view(np.uint64)
        mixed = (mixed ^ (mixed >> _HALF)) * _MIX_SKETCH
        start, step = mixed >> _HALF, (mixed & _LOW) | np.uint64(1)
        columns = (((start[:, None] + self._sketch_rows * step[:, None]) & _LOW) * self._width) >> _HALF
        return (columns + self._sketch_rows * self._width).view(np.int64)


def _num_sets(num_bytes: int, row_bytes: int) -> int:
    return (num_bytes - OVERHEAD_BYTES) // (WAYS * (row_bytes + SLOT_BYTES))
