"""CPU loops that read one row an id, and MEmCom's row times a number.

Each loop runs AHEAD ids in front of itself: it resolves an id to rows and asks the processor for them, then
composes the rows it asked for AHEAD ids ago. Tables and ids may be read-only (memory-mapped files, request bodies).
A negative id leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, R/M rows of tables.

from __future__ import annotations

import numpy as np

from embstore.hashing import seed_offset
from embstore.kernels.cpu.compile import compiled, kernel
from embstore.kernels.cpu.prefetch import prefetch
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
    put_row_scaled,
    void,
)


@kernel(lambda table: void(table, IDS, OUT))
def gather(weight, ids, out):
    """out = weight[ids]."""
    num_ids = ids.shape[0]
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            prefetch_row(weight, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            prefetch_row(weight, ids[i + AHEAD])
        if ids[i] >= 0:
            put_row(weight, ids[i], out, i, 0)


@kernel(lambda table: void(table, IDS, OUT))
def gather_mod(weight, ids, out):
    """out = weight[ids mod M]."""
    num_ids, num_rows = ids.shape[0], weight.shape[0]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row(weight, ring[slot], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            ring[slot] = mod(ids[step], num_rows)
            prefetch_row(weight, ring[slot])


@kernel(lambda table: void(table, IDS, int64, OUT))
def _gather_hash(weight, ids, offset, out):
    num_ids, num_rows = ids.shape[0], weight.shape[0]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row(weight, ring[slot], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            ring[slot] = bucket(ids[step], num_rows, offset)
            prefetch_row(weight, ring[slot])


def gather_hash(weight, ids, seed, out):
    """out = weight[bucket(ids, M, seed)]."""
    _gather_hash(weight, ids, seed_offset(seed), out)


@kernel(lambda table: void(table, FLOATS, IDS, OUT))
def gather_scaled(shared, scale, ids, out):
    """out = shared[ids mod M] * scale[ids, 0]."""
    num_ids, num_rows = ids.shape[0], shared.shape[0]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row_scaled(shared, ring[slot], scale[ids[i], 0], out, i, 0)
        if step < num_ids and ids[step] >= 0:
            ring[slot] = mod(ids[step], num_rows)
            prefetch(scale, ids[step], 0)
            prefetch_row(shared, ring[slot])


@kernel(lambda table: void(table, FLOATS, IDS, OUT))
def gather_scaled_biased(shared, scale_bias, ids, out):
    """out = shared[ids mod M] * scale_bias[ids, 0] + scale_bias[ids, 1]."""
    num_ids, num_rows, width = ids.shape[0], shared.shape[0], out.shape[1]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            put_row_scaled(shared, ring[slot], scale_bias[ids[i], 0], out, i, 0)
            bias = scale_bias[ids[i], 1]
            for d in range(width):
                out[i, d] += bias
        if step < num_ids and ids[step] >= 0:
            ring[slot] = mod(ids[step], num_rows)
            prefetch(scale_bias, ids[step], 0)
            prefetch_row(shared, ring[slot])


@compiled(void(FLOATS, IDS, OUT))
def add_offset(offset, ids, out):
    """out += offset[0], for ids that are not negative."""
    for i in range(ids.shape[0]):
        if ids[i] >= 0:
            for d in range(out.shape[1]):
                out[i, d] += offset[0, d]
