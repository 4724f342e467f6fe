"""Ask the processor for a row before it is needed: random rows of a large table wait on memory, not on arithmetic.

numba has no intrinsic for this, so here is one: it emits `llvm.prefetch` (read, keep in all cache levels).
Measured on 1,000 Zipf ids x 64 float32 of a 512 MB table: 19.9 us without, 17.2 us with; 16,384 ids 368 -> 290 us
(docs/decisions/0004-memory-and-kernels.md).
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LINE_BYTES = 64
"""Bytes in one cache line."""


def _emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array_type = sig.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, list(args[1:]))
    byte_pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32]), "llvm.prefetch.p0"
    )
    builder.call(function, [builder.bitcast(pointer, byte_pointer), i32(0), i32(3), i32(1)])
    return context.get_dummy_value()


@intrinsic
def prefetch(typing_context: Any, array: Any, row: Any, column: Any) -> Any:  # noqa: ARG001
    """Start loading the cache line that holds `array[row, column]`; the caller checked the indices."""
    return types.void(array, types.intp, types.intp), _emit


@intrinsic
def prefetch_1d(typing_context: Any, array: Any, index: Any) -> Any:  # noqa: ARG001
    """Start loading the cache line that holds `array[index]`; the caller checked the index."""
    return types.void(array, types.intp), _emit


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:  # noqa: ARG001
    """The float32 with these 32 bits."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), emit
