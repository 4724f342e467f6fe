"""The loops of a cache of rows in sets of eight, with frequency-aware admission: TinyLFU (Einziger et al. 2017).

A row number belongs to one set, by its hash. A set has WAYS rows of `vectors` and two cache lines of `sets`:

    words 0-7    the row number in each way, plus 1; 0: free
    words 8-9    16 bits a way, two counters of how often its row was taken: 4 bits decide what stays, 12 bits rank it
    word  10     the epoch up to which the counters of this set are halved
    words 11-15  a count-min sketch of 80 counters of 4 bits: how often rows were asked for that the set does not hold

Who is compared with whom shares a set, so a sketch for each set costs no further cache line, and ageing has no pause:
counters are halved once for every epoch that has passed when their set is next looked at.

Compiled without releasing the GIL: a call is atomic against every other thread, which is all the locking there is.
Callers pass few enough ids a call that nobody waits long for the GIL.
"""

# Shapes: S sets, B ids, D embedding_dim.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.hashing import seed_offset
from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import prefetch
from embstore.kernels.cpu.rows import AHEAD, FLOATS, IDS, OUT, int64, mix, prefetch_row, put_row, void

WAYS = 8
WORDS = 16
"""Words of 8 bytes in a set."""
MAX_COUNT = 15
MAX_RANK = 4095

_COUNTS, _EPOCH, _SKETCH = 8, 10, 11
_OFFSET = seed_offset(0)
_DEPTH, _WIDTH = 4, 20
"""A row has 4 counters in the sketch, each one of 20."""
_HALF_COUNTS, _HALF_SKETCH = 0x7FF77FF77FF77FF7, 0x7777777777777777

RING = 2 * AHEAD
"""A loop is in three places at once: it asks for a set, AHEAD ids later for the vector, and then copies it."""

SETS = types.Array(types.uint64, 2, "C")
INT64S = types.Array(types.int64, 1, "C")
CLOCK = INT64S
"""Ids taken so far, and how many of them are an epoch."""
RANKS = types.Array(types.uint16, 1, "C")


@njit(inline="always")
def _set_of(hashed, num_sets):
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(num_sets)) >> np.uint64(32))


@njit(inline="always")
def _ask(sets, num_sets, row):
    """The set of a row, its two lines asked for; -1 for no row."""
    if row < 0:
        return np.int64(-1)
    s = _set_of(mix(row, _OFFSET), num_sets)
    prefetch(sets, s, 0)
    prefetch(sets, s, _COUNTS)
    return s


@njit(inline="always")
def _age(sets, s, epoch):
    """Halve a set's counters once for every epoch since it was last looked at."""
    halvings = np.uint64(epoch) - sets[s, _EPOCH]
    if halvings == np.uint64(0):
        return
    sets[s, _EPOCH] = np.uint64(epoch)
    for _ in range(min(halvings, np.uint64(12))):
        for w in range(_COUNTS, _EPOCH):
            sets[s, w] = (sets[s, w] >> np.uint64(1)) & np.uint64(_HALF_COUNTS)
        for w in range(_SKETCH, WORDS):
            sets[s, w] = (sets[s, w] >> np.uint64(1)) & np.uint64(_HALF_SKETCH)


@njit(inline="always")
def _way_of(sets, s, key):
    """The way that holds a key, or WAYS; without a branch, so that all are compared at once."""
    found = WAYS
    for way in range(WAYS):
        found = way if sets[s, way] == key else found
    return found


@njit(inline="always")
def _counts(sets, s, way):
    return (sets[s, _COUNTS + (way >> 2)] >> np.uint64(16 * (way & 3))) & np.uint64(0xFFFF)


@njit(inline="always")
def _count(sets, s, way):
    return np.int64(_counts(sets, s, way) & np.uint64(MAX_COUNT))


@njit(inline="always")
def _add(sets, s, way):
    """One more for both counters of a way."""
    both = _counts(sets, s, way)
    more = np.uint64((both & np.uint64(MAX_COUNT)) != np.uint64(MAX_COUNT))
    more += np.uint64(16) if (both >> np.uint64(4)) < np.uint64(MAX_RANK) else np.uint64(0)
    sets[s, _COUNTS + (way >> 2)] += more << np.uint64(16 * (way & 3))


@njit(inline="always")
def _set_count(sets, s, way, count):
    word, shift = _COUNTS + (way >> 2), np.uint64(16 * (way & 3))
    sets[s, word] = (sets[s, word] & ~(np.uint64(0xFFFF) << shift)) | (np.uint64(count * 17) << shift)


@njit(inline="always")
def _counter(hashed, k):
    """Which of the counters is a key's k-th."""
    return k * _WIDTH + np.int64((((hashed >> np.uint64(8 * k)) & np.uint64(0xFF)) * np.uint64(_WIDTH)) >> np.uint64(8))


@njit(inline="always")
def _estimate(sets, s, hashed):
    """How often a key that is not in the set was asked for: the least of its counters."""
    least = np.uint64(MAX_COUNT)
    for k in range(_DEPTH):
        at = _counter(hashed, k)
        least = min(least, (sets[s, _SKETCH + (at >> 4)] >> np.uint64(4 * (at & 15))) & np.uint64(15))
    return np.int64(least)


@njit(inline="always")
def _raise_to(sets, s, hashed, count):
    """Raise a key's counters to a count where they are less: others are disturbed as little as can be."""
    count = np.uint64(min(count, MAX_COUNT))
    for k in range(_DEPTH):
        at = _counter(hashed, k)
        word, shift = _SKETCH + (at >> 4), np.uint64(4 * (at & 15))
        if (sets[s, word] >> shift) & np.uint64(15) < count:
            sets[s, word] = (sets[s, word] & ~(np.uint64(15) << shift)) | (count << shift)


@njit(inline="always")
def _place(sets, s, row, hashed):
    """The way in which a row is or may now be, or -1: what is there was asked for as often, or more.

    A tie stays as it is: a scan, whose every row is seen once, does not push out rows that were taken once since they
    were last halved. A row that is new and hot gets past them as its estimate grows and their counts are halved.
    """
    key = np.uint64(row) + np.uint64(1)
    way = _way_of(sets, s, key)
    if way < WAYS:
        return way
    way = _way_of(sets, s, np.uint64(0))
    count = max(_estimate(sets, s, hashed), np.int64(1))
    if way == WAYS:
        way = 0
        for other in range(1, WAYS):
            way = other if _count(sets, s, other) < _count(sets, s, way) else way
        least = _count(sets, s, way)
        if count <= least:
            return -1
        leaving = np.int64(sets[s, way] - np.uint64(1))
        _raise_to(sets, s, mix(leaving, _OFFSET), least)  # what is known of it now has to be in the sketch
    sets[s, way] = key
    _set_count(sets, s, way, count)
    return way


@compiled(int64(SETS, OUT, CLOCK, IDS, OUT, int64, int64, INT64S, int64), nogil=False)
def take(sets, vectors, clock, rows, out, start, stop, misses, num_misses):
    """out[i] = the vector of rows[i] for i in [start, stop), or i goes to misses; returns how many are there now."""
    num_sets, epoch = sets.shape[0], clock[0] // clock[1]
    clock[0] += stop - start
    ring = np.empty(RING, np.int64)
    for step in range(start, stop + RING):
        if step - RING >= start and ring[step % RING] >= 0:
            put_row(vectors, ring[step % RING], out, step - RING, 0)
        i = step - AHEAD
        if start <= i < stop and rows[i] >= 0:
            s = ring[i % RING]
            _age(sets, s, epoch)
            way = _way_of(sets, s, np.uint64(rows[i]) + np.uint64(1))
            if way < WAYS:
                _add(sets, s, way)
                ring[i % RING] = s * WAYS + way
                prefetch_row(vectors, s * WAYS + way)
            else:
                hashed = mix(rows[i], _OFFSET)
                _raise_to(sets, s, hashed, _estimate(sets, s, hashed) + 1)
                ring[i % RING] = -1
                misses[num_misses] = i
                num_misses += 1
        if step < stop:
            ring[step % RING] = _ask(sets, num_sets, rows[step])
    return num_misses


@compiled(void(SETS, OUT, CLOCK, IDS, FLOATS, int64, int64), nogil=False)
def put(sets, vectors, clock, rows, offered, start, stop):
    """Offer rows[i] and its vector for i in [start, stop); those that are there already are written again."""
    num_sets, epoch = sets.shape[0], clock[0] // clock[1]
    ring = np.empty(RING, np.int64)
    for step in range(start, stop + RING):
        if step - RING >= start and ring[step % RING] >= 0:  # in order: of two rows with one way the later stays
            put_row(offered, step - RING, vectors, ring[step % RING], 0)
        i = step - AHEAD
        if start <= i < stop and rows[i] >= 0:
            s = ring[i % RING]
            _age(sets, s, epoch)
            way = _place(sets, s, rows[i], mix(rows[i], _OFFSET))
            ring[i % RING] = -1
            if way >= 0:
                ring[i % RING] = s * WAYS + way
                prefetch_row(vectors, s * WAYS + way)
        if step < stop:
            ring[step % RING] = _ask(sets, num_sets, rows[step])


@compiled(int64(SETS, CLOCK, int64, int64, INT64S, RANKS), nogil=False)
def rank(sets, clock, first, last, rows, ranks):
    """The rows that sets [first, last) hold, and how often each was taken, by counts that age; returns how many."""
    epoch, num_rows = clock[0] // clock[1], 0
    for s in range(first, last):
        _age(sets, s, epoch)
        for way in range(WAYS):
            if sets[s, way] != np.uint64(0):
                rows[num_rows] = np.int64(sets[s, way] - np.uint64(1))
                ranks[num_rows] = _counts(sets, s, way) >> np.uint64(4)
                num_rows += 1
    return num_rows
