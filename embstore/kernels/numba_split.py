"""CPU loops for tables in two parts, rows of hot ids and rows that the others share, and for rows by a stored map.

Each runs AHEAD ids in front of itself, the map's loop twice that. A negative id leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, H hot ids, C cold rows.

from __future__ import annotations

import numpy as np
from numba import types

from embstore.hashing import seed_offset
from embstore.kernels.compiled import kernel
from embstore.kernels.numba_rows import (
    AHEAD,
    FLOATS,
    IDS,
    OUT,
    bucket,
    fetch,
    int64,
    mod,
    put_row,
    void,
)
from embstore.kernels.prefetch import prefetch_1d

MAP = types.Array(types.int32, 1, "C", readonly=True)


@kernel(lambda table: void(table, FLOATS, int64, IDS, OUT))
def gather_split(cold, hot, num_cold, ids, out):
    """out = hot[ids] where ids < H, else cold[(ids - H) mod num_cold], or cold[ids - H] where num_cold is 0."""
    num_ids, num_hot = ids.shape[0], hot.shape[0]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            if ids[i] < num_hot:
                put_row(hot, ids[i], out, i, 0)
            else:
                put_row(cold, ring[slot], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            if ids[step] < num_hot:
                fetch(hot, ids[step])
            else:
                row = ids[step] - num_hot
                ring[slot] = mod(row, num_cold) if num_cold > 0 else row
                fetch(cold, ring[slot])


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
            fetch(weight, ring[slot])


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
            fetch(weight, ring[slot])


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
            fetch(weight, ring[slot])
        if step < num_ids and ids[step] >= 0:
            prefetch_1d(row_of, ids[step])
