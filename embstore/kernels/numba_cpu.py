"""Fused CPU loops for every operation: one pass over the ids, rows fetched ahead, the GIL released.

Each loop runs AHEAD ids in front of itself: it resolves an id to rows and asks the processor for them, then
composes the rows it asked for AHEAD ids ago. Signatures are fixed, so everything is compiled once and cached on disk;
tables and ids may be read-only (memory-mapped files, request bodies).
Arithmetic is the reference's, operation by operation (no fused multiply-add), so results are equal bit for bit.
"""

# Shapes: B ids, D embedding_dim, R/M/Q rows of tables; see the package docstring.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.hashing import MUL1, MUL2, seed_offset
from embstore.kernels.compiled import compiled
from embstore.kernels.prefetch import LINE_FLOATS, prefetch

AHEAD = 8

TABLE = types.Array(types.float32, 2, "C", readonly=True)
IDS = types.Array(types.int64, 1, "C", readonly=True, aligned=False)
OUT = types.Array(types.float32, 2, "C")


@njit(inline="always")
def _mod(id_, num_rows):
    return np.int64(np.uint64(id_) % np.uint64(num_rows))


@njit(inline="always")
def _bucket(id_, num_rows, offset):
    z = np.uint64(id_) + np.uint64(offset)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MUL2)
    z = z ^ (z >> np.uint64(31))
    return np.int64(((z >> np.uint64(32)) * np.uint64(num_rows)) >> np.uint64(32))


@njit(inline="always")
def _fetch(table, row):
    for column in range(0, table.shape[1], LINE_FLOATS):
        prefetch(table, row, column)


@compiled(types.void(TABLE, IDS, OUT))
def gather(weight, ids, out):
    """out = weight[ids]."""
    num_ids, width = ids.shape[0], weight.shape[1]
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            _fetch(weight, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            _fetch(weight, ids[i + AHEAD])
        row = ids[i]
        if row >= 0:
            for d in range(width):
                out[i, d] = weight[row, d]


@compiled(types.void(TABLE, IDS, OUT))
def gather_mod(weight, ids, out):
    """out = weight[ids mod M]."""
    num_ids, num_rows, width = ids.shape[0], weight.shape[0], weight.shape[1]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            row = ring[slot]
            for d in range(width):
                out[i, d] = weight[row, d]
        if step < num_ids and ids[step] >= 0:
            ring[slot] = _mod(ids[step], num_rows)
            _fetch(weight, ring[slot])


@compiled(types.void(TABLE, IDS, types.int64, OUT))
def _gather_hash(weight, ids, offset, out):
    num_ids, num_rows, width = ids.shape[0], weight.shape[0], weight.shape[1]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            row = ring[slot]
            for d in range(width):
                out[i, d] = weight[row, d]
        if step < num_ids and ids[step] >= 0:
            ring[slot] = _bucket(ids[step], num_rows, offset)
            _fetch(weight, ring[slot])


def gather_hash(weight, ids, seed, out):
    """out = weight[bucket(ids, M, seed)]."""
    _gather_hash(weight, ids, seed_offset(seed), out)


@compiled(types.void(TABLE, TABLE, IDS, OUT))
def gather_pair_mul(quotient, remainder, ids, out):
    """out = quotient[ids // R] * remainder[ids mod R]."""
    num_ids, num_remainders, width = ids.shape[0], remainder.shape[0], remainder.shape[1]
    ring = np.empty((AHEAD, 2), np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            q, r = ring[slot, 0], ring[slot, 1]
            for d in range(width):
                out[i, d] = quotient[q, d] * remainder[r, d]
        if step < num_ids and ids[step] >= 0:
            q = np.int64(np.uint64(ids[step]) // np.uint64(num_remainders))
            r = ids[step] - q * num_remainders
            ring[slot, 0], ring[slot, 1] = q, r
            _fetch(quotient, q)
            _fetch(remainder, r)


@compiled(types.void(TABLE, TABLE, IDS, OUT))
def gather_pair_add(quotient, remainder, ids, out):
    """out = quotient[ids // R] + remainder[ids mod R]."""
    num_ids, num_remainders, width = ids.shape[0], remainder.shape[0], remainder.shape[1]
    ring = np.empty((AHEAD, 2), np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            q, r = ring[slot, 0], ring[slot, 1]
            for d in range(width):
                out[i, d] = quotient[q, d] + remainder[r, d]
        if step < num_ids and ids[step] >= 0:
            q = np.int64(np.uint64(ids[step]) // np.uint64(num_remainders))
            r = ids[step] - q * num_remainders
            ring[slot, 0], ring[slot, 1] = q, r
            _fetch(quotient, q)
            _fetch(remainder, r)


@compiled(types.void(TABLE, TABLE, IDS, OUT))
def gather_pair_concat(quotient, remainder, ids, out):
    """out = [quotient[ids // R], remainder[ids mod R]]."""
    num_ids, num_remainders = ids.shape[0], remainder.shape[0]
    width_q, width_r = quotient.shape[1], remainder.shape[1]
    ring = np.empty((AHEAD, 2), np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            q, r = ring[slot, 0], ring[slot, 1]
            for d in range(width_q):
                out[i, d] = quotient[q, d]
            for d in range(width_r):
                out[i, width_q + d] = remainder[r, d]
        if step < num_ids and ids[step] >= 0:
            q = np.int64(np.uint64(ids[step]) // np.uint64(num_remainders))
            r = ids[step] - q * num_remainders
            ring[slot, 0], ring[slot, 1] = q, r
            _fetch(quotient, q)
            _fetch(remainder, r)


@compiled(types.void(TABLE, TABLE, IDS, OUT))
def gather_scaled(shared, scale, ids, out):
    """out = shared[ids mod M] * scale[ids, 0]."""
    num_ids, num_rows, width = ids.shape[0], shared.shape[0], shared.shape[1]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            row, factor = ring[slot], scale[ids[i], 0]
            for d in range(width):
                out[i, d] = shared[row, d] * factor
        if step < num_ids and ids[step] >= 0:
            ring[slot] = _mod(ids[step], num_rows)
            prefetch(scale, ids[step], 0)
            _fetch(shared, ring[slot])


@compiled(types.void(TABLE, TABLE, IDS, OUT))
def gather_scaled_biased(shared, scale_bias, ids, out):
    """out = shared[ids mod M] * scale_bias[ids, 0] + scale_bias[ids, 1]."""
    num_ids, num_rows, width = ids.shape[0], shared.shape[0], shared.shape[1]
    ring = np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            row, factor, bias = ring[slot], scale_bias[ids[i], 0], scale_bias[ids[i], 1]
            for d in range(width):
                out[i, d] = shared[row, d] * factor + bias
        if step < num_ids and ids[step] >= 0:
            ring[slot] = _mod(ids[step], num_rows)
            prefetch(scale_bias, ids[step], 0)
            _fetch(shared, ring[slot])


@compiled(types.boolean(types.Array(types.uint32, 1, "C", readonly=True, aligned=False)))
def all_finite(bits):
    """Whether float32 values, given as their bits, hold no NaN and no infinity."""
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        worst = max(worst, bits[i] & np.uint32(0x7F800000))
    return worst != np.uint32(0x7F800000)
