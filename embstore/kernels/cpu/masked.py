"""CPU loops over rows of different widths that lie one after the other in one array: a row is the start of a vector.

Ids of a block have rows of one width, so an id's row starts at `shifts[block] + id * widths[block]`. A negative id
leaves its row of `out` untouched.
"""

# Shapes: B ids, D embedding_dim, K blocks of ids.

from __future__ import annotations

import numpy as np
from numba import njit

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import LINE_BYTES, prefetch
from embstore.kernels.cpu.project import INTS
from embstore.kernels.cpu.rows import AHEAD, FLOATS, IDS, OUT, void
from embstore.kernels.cpu.simd_rows import multiply_row, pad_row


@njit(inline="always")
def _block(ends, id_):
    """The block of an id; counted, not searched: a branch that depends on the id is guessed wrong."""
    k = 0
    for j in range(ends.shape[0] - 1):
        k += id_ >= ends[j]
    return k


@njit(inline="always")
def _prefetch(values, start, width):
    for at in range(start, start + width, LINE_BYTES // 4):
        prefetch(values, 0, at)
    prefetch(values, 0, start + width - 1)


@compiled(void(FLOATS, INTS, INTS, INTS, IDS, OUT))
def prefix(values, ends, widths, shifts, ids, out):
    """out = the row of each id, then zeros."""
    num_ids = ids.shape[0]
    starts, lengths = np.empty(AHEAD, np.int64), np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            pad_row(values, starts[slot], lengths[slot], out, i)
        if step < num_ids and ids[step] >= 0:
            k = _block(ends, ids[step])
            starts[slot], lengths[slot] = shifts[k] + ids[step] * widths[k], widths[k]
            _prefetch(values, starts[slot], lengths[slot])


@compiled(void(FLOATS, FLOATS, INTS, INTS, INTS, IDS, OUT))
def prefix_rotated(values, rotation, ends, widths, shifts, ids, out):
    """out = the row of each id times as many rows of `rotation`, added in their order."""
    num_ids, zeros = ids.shape[0], np.zeros((1, out.shape[1]), np.float32)
    starts, lengths = np.empty(AHEAD, np.int64), np.empty(AHEAD, np.int64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            multiply_row(zeros, values, 0, starts[slot], lengths[slot], rotation, out, i)
        if step < num_ids and ids[step] >= 0:
            k = _block(ends, ids[step])
            starts[slot], lengths[slot] = shifts[k] + ids[step] * widths[k], widths[k]
            _prefetch(values, starts[slot], lengths[slot])
