"""A tile of a matrix product, in registers: ROWS rows of inputs times LANES columns of weights.

LLVM's loop vectoriser does not keep a tile of sums in registers, so the tile is written as vectors: each input is
multiplied with LANES weights and added to its row's LANES sums. Sums run over the inputs in order, so a row's result
does not depend on the rows beside it. Products are fused with the additions where the processor can do that.

Measured on one AMD Zen 4 core: 117 GFLOP/s from the first-level cache, which is its peak.
"""
# ruff: noqa: ARG001  an intrinsic is told of its arguments by their types

# Shapes: T = ROWS, K inputs (at most DEPTH at a time), C columns.

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Columns of a tile: one vector of AVX-512, two of AVX2, four of NEON."""
DEPTH = 64
"""Columns of the array that the inputs lie in. A constant, so that one register reaches all its rows."""


def _has_32_registers() -> bool:
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on every platform; numba asks the same way
        return False
    return bool(features.get("avx512f", False))


ROWS = 12 if _has_32_registers() else 6
"""Rows of a tile: their sums, a row of weights and an input fill the 32 (16) vector registers."""


@intrinsic
def multiply_tile(
    typing_context: Any,
    block: Any,
    depth: Any,
    layers: Any,
    q: Any,
    k: Any,
    initial: Any,
    row: Any,
    step: Any,
    outputs: Any,
    column: Any,
) -> Any:
    """outputs[t, c] = initial[row + t * step, c] + block[t, :depth] @ layers[q, k : k + depth, c], for all t < ROWS
    and c from `column` to `column + LANES`. The caller sees to the bounds; `block` has DEPTH columns."""
    size, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
    lanes, zero = ir.VectorType(ir.IntType(32), LANES), ir.IntType(32)(0)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        block, layers, initial, outputs = (
            context.make_array(sig.args[n])(context, builder, args[n]) for n in (0, 2, 5, 8)
        )
        depth, q, k, row, step, column = (args[n] for n in (1, 3, 4, 6, 7, 9))
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
        )

        def at(array: Any, row: Any, ndim: int = 2) -> Any:
            """Where a row's columns from `column` on are, as a vector."""
            width = builder.extract_value(array.shape, ndim - 1)
            position = builder.gep(array.data, [builder.add(builder.mul(row, width), column)])
            return builder.bitcast(position, vector.as_pointer())

        first = builder.add(builder.mul(q, builder.extract_value(layers.shape, 1)), k)
        starts = [builder.load(at(initial, builder.add(row, builder.mul(step, size(t)))), align=4) for t in range(ROWS)]
        entry, loop, done = builder.block, builder.append_basic_block("tile"), builder.append_basic_block("tile.done")
        builder.branch(loop)

        builder.position_at_end(loop)
        d, sums = builder.phi(size), [builder.phi(vector) for _ in range(ROWS)]
        weights = builder.load(at(layers, builder.add(first, d), ndim=3), align=4)
        added = []
        for t, total in enumerate(sums):
            value = builder.load(builder.gep(block.data, [builder.add(d, size(t * DEPTH))]))
            alone = builder.insert_element(ir.Constant(vector, ir.Undefined), value, zero)
            everywhere = builder.shuffle_vector(alone, alone, ir.Constant(lanes, [0] * LANES))
            added.append(builder.call(multiply_add, [everywhere, weights, total]))
        after = builder.add(d, size(1))
        for phi, before, then in [(d, size(0), after), *zip(sums, starts, added, strict=True)]:
            phi.add_incoming(before, entry)
            phi.add_incoming(then, loop)
        builder.cbranch(builder.icmp_signed("<", after, depth), loop, done)

        builder.position_at_end(done)
        for t, total in enumerate(added):
            builder.store(total, at(outputs, size(t)), align=4)
        return context.get_dummy_value()

    index = types.intp
    return types.void(block, index, layers, index, index, initial, index, index, outputs, index), emit
