"""A loop that reads given cache lines and writes rows: what any lookup that reads these lines is measured against."""

# Shapes: B ids, L lines of an id, D floats of a row.

from __future__ import annotations

from numba import types

from embstore.kernels.compiled import compiled
from embstore.kernels.numba_rows import AHEAD, FLOATS, OUT, void
from embstore.kernels.prefetch import prefetch

LINE_FLOATS = 16
LINES = types.Array(types.int32, 2, "C", readonly=True)


@compiled(void(FLOATS, LINES, OUT))
def gather_lines(memory, lines, out):
    """out[i] = the lines of id i, one after the other, over each other where they are more than a row holds.

    Rows are whole lines; where an id reads fewer lines than a row has, its first line fills the rest.
    """
    num_ids, most, per_row = lines.shape[0], lines.shape[1], out.shape[1] // LINE_FLOATS
    for i in range(min(AHEAD, num_ids)):
        for j in range(most):
            if lines[i, j] >= 0:
                prefetch(memory, lines[i, j], 0)
    for i in range(num_ids):
        if i + AHEAD < num_ids:
            for j in range(most):
                if lines[i + AHEAD, j] >= 0:
                    prefetch(memory, lines[i + AHEAD, j], 0)
        for j in range(max(most, per_row)):
            line = lines[i, j] if j < most else lines[i, 0]
            at = j % per_row * LINE_FLOATS
            if line >= 0:
                for d in range(LINE_FLOATS):
                    out[i, at + d] = memory[line, d]
