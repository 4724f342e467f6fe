"""CPU loops that multiply an id's short row by a projection, fused with the gather of the row.

Products are added in the order of the row's columns, for each id alone: an id's vector does not depend on the batch it
came in (a matrix product's may). A negative id leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, R columns of a short row, K blocks of ids.

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from embstore.kernels.cpu.compile import compiled, kernel
from embstore.kernels.cpu.prefetch import prefetch
from embstore.kernels.cpu.rows import (
    AHEAD,
    FLOATS,
    IDS,
    OUT,
    int64,
    prefetch_row,
    put_row,
    row_width,
    void,
)
from embstore.kernels.cpu.simd_rows import multiply_row

INTS = types.Array(types.int64, 1, "C", readonly=True)
PLACES = types.Array(types.int64, 1, "C")


@njit(inline="always")
def _prefetch_own(table, row):
    prefetch_row(table, row)
    prefetch(table, row, table.shape[1] - 1)  # short rows may lie across two lines


def put_projected(table, row, scratch, base, projection, out, i):
    """out[i] = base[0] + table[row] @ projection; scratch: float32 [1, R]."""


@overload(put_projected, inline="always")
def _put_projected(table, row, scratch, base, projection, out, i):
    if table.dtype == types.float32:
        return lambda table, row, scratch, base, projection, out, i: multiply_row(
            base, table, row, 0, table.shape[1], projection, out, i
        )

    def packed(table, row, scratch, base, projection, out, i):
        put_row(table, row, scratch, 0, 0)
        multiply_row(base, scratch, 0, 0, scratch.shape[1], projection, out, i)

    return packed


@kernel(lambda table: void(table, FLOATS, FLOATS, IDS, OUT))
def project(factors, projection, offset, ids, out):
    """out = offset[0] + factors[ids] @ projection."""
    num_ids, scratch = ids.shape[0], np.empty((1, row_width(factors)), np.float32)
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            _prefetch_own(factors, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            _prefetch_own(factors, ids[i + AHEAD])
        if ids[i] >= 0:
            put_projected(factors, ids[i], scratch, offset, projection, out, i)


@compiled(void(INTS, IDS, PLACES, PLACES))
def sort_by_block(ends, ids, begins, places):
    """places[begins[k] : begins[k + 1]] are where ids of block k stand, in order: ends[k - 1] <= id < ends[k]."""
    num_blocks = ends.shape[0]
    block = np.empty(ids.shape[0], np.int32)
    next_ = np.zeros(num_blocks + 1, np.int64)
    for i in range(ids.shape[0]):
        k = 0
        for j in range(num_blocks - 1):
            k += ids[i] >= ends[j]
        block[i] = k
        if ids[i] >= 0:
            next_[k + 1] += 1
    for k in range(num_blocks):
        next_[k + 1] += next_[k]
        begins[k] = next_[k]
    begins[num_blocks] = next_[num_blocks]
    for i in range(ids.shape[0]):
        if ids[i] >= 0:
            places[next_[block[i]]] = i
            next_[block[i]] += 1


@kernel(lambda table: void(table, FLOATS, int64, IDS, PLACES, int64, int64, OUT))
def project_block(rows, projection, first, ids, places, begin, end, out):
    """out[i] = rows[ids[i] - first] @ projection for i in places[begin:end]."""
    scratch, zeros = np.empty((1, row_width(rows)), np.float32), np.zeros((1, out.shape[1]), np.float32)
    for t in range(begin, min(begin + AHEAD, end)):
        _prefetch_own(rows, ids[places[t]] - first)
    for t in range(begin, end):
        if t + AHEAD < end:
            _prefetch_own(rows, ids[places[t + AHEAD]] - first)
        i = places[t]
        put_projected(rows, ids[i] - first, scratch, zeros, projection, out, i)


@kernel(lambda table: void(table, int64, IDS, PLACES, int64, int64, OUT))
def gather_block(rows, first, ids, places, begin, end, out):
    """out[i] = rows[ids[i] - first] for i in places[begin:end]."""
    for t in range(begin, min(begin + AHEAD, end)):
        prefetch_row(rows, ids[places[t]] - first)
    for t in range(begin, end):
        if t + AHEAD < end:
            prefetch_row(rows, ids[places[t + AHEAD]] - first)
        put_row(rows, ids[places[t]] - first, out, places[t], 0)
