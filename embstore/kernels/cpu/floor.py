"""A loop that reads given cache lines and writes rows: what any lookup that reads these lines is measured against."""

# Shapes: B ids, R runs of lines of an id, D floats of a row.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import LINE_BYTES, prefetch_1d
from embstore.kernels.cpu.rows import AHEAD, OUT, void

LINE_FLOATS = LINE_BYTES // 4
u64 = np.uint64
"""Indices that cannot be negative: numba leaves out the test for those that count from the end."""
RUNS = types.Array(types.int32, 3, "C", readonly=True)
MEMORY = types.Array(types.float32, 1, "C", readonly=True)


@njit(inline="always")
def _ask(memory, first, count):
    """Ask for the lines of a run."""
    if count > 0:
        prefetch_1d(memory, first)
    if count > 1:
        prefetch_1d(memory, first + LINE_FLOATS)
    if count > 2:
        prefetch_1d(memory, first + 2 * LINE_FLOATS)
    if count > 3:
        prefetch_1d(memory, first + 3 * LINE_FLOATS)
    for line in range(4, count):
        prefetch_1d(memory, first + line * LINE_FLOATS)


@compiled(void(MEMORY, RUNS, OUT))
def gather_runs(memory, runs, out):
    """out[i] = the lines of id i: runs[i, j] is the first line of a run and how many lines it has (0: no run).

    Runs are written over each other; where an id reads fewer lines than a row has, its first line fills the rest.
    """
    num_ids, most, width = runs.shape[0], runs.shape[1], out.shape[1]
    for step in range(num_ids + AHEAD):
        i = step - AHEAD
        if i >= 0:
            filled = 0
            for j in range(most):
                first, count = u64(runs[i, j, 0] * LINE_FLOATS), min(runs[i, j, 1] * LINE_FLOATS, width)
                for d in range(u64(count)):
                    out[i, d] = memory[first + d]
                filled = max(filled, count)
            first = u64(runs[i, 0, 0] * LINE_FLOATS)
            for at in range(filled, width, LINE_FLOATS):
                for d in range(u64(LINE_FLOATS)):
                    out[i, u64(at) + d] = memory[first + d]
        if step < num_ids:
            for j in range(most):
                _ask(memory, runs[step, j, 0] * LINE_FLOATS, runs[step, j, 1])
