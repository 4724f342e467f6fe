"""CPU loops for tables in two parts, rows of hot ids and rows that the others share, and for rows by a stored map.

Each runs AHEAD ids in front of itself, the map's loop twice that. A negative id leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, H hot ids, C cold rows.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.hashing import seed_offset
from embstore.kernels.cpu.compile import kernel
from embstore.kernels.cpu.prefetch import prefetch_1d
from embstore.kernels.cpu.rows import (
    AHEAD,
    FLOATS,
    IDS,
    OUT,
    bucket,
    int64,
    mod,
    prefetch_row,
    put_row,
    void,
)

BLOCK = 128
MAP = types.Array(types.int32, 1, "C", readonly=True)


@njit(inline="always")
def _gather_block(table, rows, places, count, out):
    """out[places[t]] = table[rows[t]] for the first `count`."""
    for t in range(min(AHEAD, count)):
        prefetch_row(table, rows[t])
    for t in range(count):
        if t + AHEAD < count:
            prefetch_row(table, rows[t + AHEAD])
        put_row(table, rows[t], out, places[t], 0)


@kernel(lambda table: void(table, FLOATS, int64, IDS, OUT))
def gather_split(cold, hot, num_cold, ids, out):
    """out = hot[ids] where ids < H, else cold[(ids - H) mod num_cold], or cold[ids - H] where num_cold is 0.

    BLOCK ids at a time are sorted into hot and cold without a branch: whether an id is hot is what a processor cannot
    guess (1,000 Zipf ids x 64, int8 and float32 rows: 26 us with a branch an id, 16 us so).
    """
    num_ids, num_hot = ids.shape[0], hot.shape[0]
    hot_rows, hot_places = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    cold_rows, cold_places = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for first in range(0, num_ids, BLOCK):
        hots, colds = 0, 0
        for i in range(first, min(first + BLOCK, num_ids)):
            hot_rows[hots], hot_places[hots] = ids[i], i
            cold_rows[colds], cold_places[colds] = ids[i] - num_hot, i
            hots += (ids[i] >= 0) & (ids[i] < num_hot)
            colds += ids[i] >= num_hot
        if num_cold > 0:
            for t in range(colds):
                cold_rows[t] = mod(cold_rows[t], num_cold)
        _gather_block(hot, hot_rows, hot_places, hots, out)
        _gather_block(cold, cold_rows, cold_places, colds, out)


@kernel(lambda table: void(table, int64, IDS, OUT))
def gather_hot_mod(weight, num_hot, ids, out):
    """out = weight[ids] where ids < H, else weight[H + (ids - H) mod C], C being the rows after the first H."""
    num_ids, num_cold = ids.shape[0], weight.shape[0] - num_hot
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row(weight, ring[slot], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            row = ids[step]
            ring[slot] = row if row < num_hot else num_hot + mod(row - num_hot, num_cold)
            prefetch_row(weight, ring[slot])


@kernel(lambda table: void(table, int64, IDS, int64, OUT))
def _gather_hot_hash(weight, num_hot, ids, offset, out):
    num_ids, num_cold = ids.shape[0], weight.shape[0] - num_hot
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row(weight, ring[slot], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            row = ids[step]
            ring[slot] = row if row < num_hot else num_hot + bucket(row, num_cold, offset)
            prefetch_row(weight, ring[slot])


def gather_hot_hash(weight, num_hot, ids, seed, out):
    """out = weight[ids] where ids < H, else weight[H + bucket(ids, C, seed)]."""
    _gather_hot_hash(weight, num_hot, ids, seed_offset(seed), out)


@kernel(lambda table: void(table, MAP, IDS, OUT))
def gather_mapped(weight, row_of, ids, out):
    """out = weight[row_of[ids]]; the caller checked that the map leads into the table."""
    num_ids = ids.shape[0]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + 2 * AHEAD):
        slot = step % AHEAD
        i = step - 2 * AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row(weight, ring[slot], out, i, 0)
        i = step - AHEAD
        if 0 <= i < num_ids and ids[i] >= 0:
            ring[slot] = row_of[ids[i]]
            prefetch_row(weight, ring[slot])
        if step < num_ids and ids[step] >= 0:
            prefetch_1d(row_of, ids[step])
