"""From keys to rows: the range check of dense ids and the probing of vocabularies, compiled.

A vocabulary is an open-addressing hash table: `slots` holds row numbers (or -1), the keys lie in row order beside it.
The hash's high 32 bits times the capacity, shifted, give the first slot; the next ones follow in line.
Probing is bounded by the capacity, so even a damaged table ends.
"""

# Shapes: B keys in a batch, N keys in the vocabulary, C slots. Strings: UTF-8 bytes in one array, offsets [. + 1].

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.hashing import MUL1, MUL2, seed_offset
from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import prefetch
from embstore.kernels.cpu.rows import IDS

SLOTS = types.Array(types.int32, 2, "C", readonly=True)
SLOTS_OUT = types.Array(types.int32, 2, "C")
ROWS_OUT = types.Array(types.int64, 1, "C")
BYTES = types.Array(types.uint8, 1, "C", readonly=True)
OFFSETS = types.Array(types.int64, 1, "C", readonly=True)
OFFSETS_32 = types.Array(types.uint32, 1, "C", readonly=True)

_OFFSET = seed_offset(0)
AHEAD = 8


@njit(inline="always")
def _mix(word):
    z = np.uint64(word) + np.uint64(_OFFSET)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MUL2)
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def _slot(hashed, capacity):
    return np.int64(((hashed >> np.uint64(32)) * np.uint64(capacity)) >> np.uint64(32))


@njit(inline="always")
def _hash_bytes(data, start, stop):
    """Eight bytes at a time, little-endian, through the mixer; the length goes in first."""
    hashed = _mix(stop - start)
    at = start
    while at < stop:
        word = np.uint64(0)
        for k in range(min(np.int64(8), stop - at)):
            word |= np.uint64(data[at + k]) << np.uint64(8 * k)
        hashed = _mix(hashed ^ word)
        at += 8
    return hashed


@compiled(types.int64(IDS, types.int64))
def count_outside(ids, num_ids):
    """How many ids are not in `[0, num_ids)`."""
    outside = 0
    for i in range(ids.shape[0]):
        outside += np.uint64(ids[i]) >= np.uint64(num_ids)
    return outside


@compiled(types.void(IDS, SLOTS_OUT, types.Array(types.int64, 1, "C")))
def fill_int64(keys, slots, duplicate):
    """Insert keys in row order; `duplicate[0]` becomes the row of the first key that was there before, else -1."""
    capacity = slots.shape[0]
    duplicate[0] = -1
    for row in range(keys.shape[0]):
        at = _slot(_mix(keys[row]), capacity)
        while slots[at, 0] >= 0:
            if keys[slots[at, 0]] == keys[row]:
                duplicate[0] = row
                return
            at = at + 1 if at + 1 < capacity else 0
        slots[at, 0] = row


@compiled(types.int64(IDS, SLOTS, IDS, ROWS_OUT))
def find_int64(keys, slots, wanted, rows):
    """rows[i] = row of wanted[i], or -1; returns how many are missing."""
    capacity, num_wanted, missing = slots.shape[0], wanted.shape[0], 0
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_wanted + AHEAD):
        i = step - AHEAD
        if i >= 0:
            at = ring[step % AHEAD]
            row = np.int64(-1)
            for _ in range(capacity):
                candidate = slots[at, 0]
                if candidate < 0:
                    break
                if keys[candidate] == wanted[i]:
                    row = np.int64(candidate)
                    break
                at = at + 1 if at + 1 < capacity else 0
            rows[i] = row
            missing += row < 0
        if step < num_wanted:
            at = _slot(_mix(wanted[step]), capacity)
            ring[step % AHEAD] = at
            prefetch(slots, at, 0)
    return missing


@njit(inline="always")
def _same(data_a, start_a, stop_a, data_b, start_b, stop_b):
    if stop_a - start_a != stop_b - start_b:
        return False
    for k in range(stop_a - start_a):  # noqa: SIM110  numba compiles loops, not generators
        if data_a[start_a + k] != data_b[start_b + k]:
            return False
    return True


@compiled(types.void(BYTES, OFFSETS_32, SLOTS_OUT, ROWS_OUT), types.void(BYTES, OFFSETS, SLOTS_OUT, ROWS_OUT))
def fill_string(data, offsets, slots, duplicate):
    """Insert string keys in row order; `duplicate[0]` as in fill_int64."""
    capacity = slots.shape[0]
    duplicate[0] = -1
    for row in range(offsets.shape[0] - 1):
        start, stop = np.int64(offsets[row]), np.int64(offsets[row + 1])
        at = _slot(_hash_bytes(data, start, stop), capacity)
        while slots[at, 0] >= 0:
            other = slots[at, 0]
            if _same(data, start, stop, data, np.int64(offsets[other]), np.int64(offsets[other + 1])):
                duplicate[0] = row
                return
            at = at + 1 if at + 1 < capacity else 0
        slots[at, 0] = row


@compiled(
    types.int64(BYTES, OFFSETS_32, SLOTS, BYTES, OFFSETS, ROWS_OUT),
    types.int64(BYTES, OFFSETS, SLOTS, BYTES, OFFSETS, ROWS_OUT),
)
def find_string(data, offsets, slots, wanted, wanted_offsets, rows):
    """rows[i] = row of the i-th wanted string, or -1; returns how many are missing."""
    capacity, missing = slots.shape[0], 0
    for i in range(wanted_offsets.shape[0] - 1):
        start, stop = wanted_offsets[i], wanted_offsets[i + 1]
        at = _slot(_hash_bytes(wanted, start, stop), capacity)
        row = np.int64(-1)
        for _ in range(capacity):
            candidate = slots[at, 0]
            if candidate < 0:
                break
            if _same(wanted, start, stop, data, np.int64(offsets[candidate]), np.int64(offsets[candidate + 1])):
                row = np.int64(candidate)
                break
            at = at + 1 if at + 1 < capacity else 0
        rows[i] = row
        missing += row < 0
    return missing


@compiled(types.void(BYTES, OFFSETS, ROWS_OUT))
def hash_strings(data, offsets, hashes):
    """hashes[i] = the 64-bit hash of the i-th string."""
    for i in range(offsets.shape[0] - 1):
        hashes[i] = np.int64(_hash_bytes(data, offsets[i], offsets[i + 1]))
