"""Whether a whole table is finite, at memory speed."""

from __future__ import annotations

import numpy as np
from numba import types

from embstore.kernels.cpu.compile import compiled


@compiled(types.boolean(types.Array(types.uint32, 1, "C", readonly=True, aligned=False)))
def all_finite(bits):
    """Whether float32 values, given as their bits, hold no NaN and no infinity."""
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        worst = max(worst, bits[i] & np.uint32(0x7F800000))
    return worst != np.uint32(0x7F800000)
