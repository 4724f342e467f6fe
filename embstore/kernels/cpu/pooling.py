"""From vectors to bags: rows of a buffer are added, or compared, into the rows of their bags, in the order of ids.

`bags[i]` is the row of `out` that vector i belongs to; vectors of bag -1 are left out, their rows are not read.
"""

from __future__ import annotations

from numba import types

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.rows import FLOATS, IDS, OUT, void

WEIGHTS = types.Array(types.float32, 1, "C", readonly=True)


@compiled(void(FLOATS, WEIGHTS, IDS, OUT))
def add_to_bags(vectors, weights, bags, out):
    """out[bags[i]] += vectors[i] * weights[i], the product rounded before the sum."""
    for i in range(bags.shape[0]):
        bag = bags[i]
        if bag >= 0:
            for d in range(out.shape[1]):
                out[bag, d] += vectors[i, d] * weights[i]


@compiled(void(FLOATS, IDS, OUT))
def max_to_bags(vectors, bags, out):
    """out[bags[i]] = the larger of it and vectors[i], number by number."""
    for i in range(bags.shape[0]):
        bag = bags[i]
        if bag >= 0:
            for d in range(out.shape[1]):
                if vectors[i, d] > out[bag, d]:
                    out[bag, d] = vectors[i, d]
