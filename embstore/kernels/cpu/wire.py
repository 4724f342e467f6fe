"""From float32 to the encodings of replies, on the numbers' bits: integer steps that the compiler turns into SIMD.

What comes out is finite, or the loop says where not. Halves are rounded to nearest even, as numpy and torch round.
"""

# Shapes: N numbers, B rows, D embedding_dim.

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.prefetch import as_float

BITS = types.Array(types.uint32, 1, "C", readonly=True, aligned=False)
BITS_2D = types.Array(types.uint32, 2, "C", readonly=True, aligned=False)
HALVES_OUT = types.Array(types.uint16, 1, "C", aligned=False)
BYTES_OUT = types.Array(types.uint8, 2, "C")

_SIZE = np.uint32(0x7FFFFFFF)
"""All bits but the sign."""
_TOO_LARGE_FOR_FLOAT16 = np.uint32(0x477FF000)
"""Bits of 65,520: from here on numbers round to infinity."""
_TOO_LARGE_FOR_BFLOAT16 = np.uint32(0x7F7F8000)
_FLOAT16_NORMAL = np.uint32(113 << 23)
"""Bits of 2^-14: what is smaller is a subnormal half."""
_HALF = np.uint32(126 << 23)
"""Bits of 0.5, whose last place is 2^-24, that of subnormal halves: adding it rounds to it."""
_REBIAS_AND_ROUND = np.uint32((1 << 32) - (112 << 23) + 0xFFF)
_ROUND = np.float32(3 << 22)
"""Added to a number of [0, 2^22) it rounds to an integer, to nearest even; the low bits are that integer."""


@intrinsic
def _as_bits(typing_context: Any, number: Any) -> Any:  # noqa: ARG001
    """The 32 bits of a float32."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@compiled(types.boolean(BITS, HALVES_OUT))
def to_bfloat16(bits, out):
    """The upper halves of float32 numbers, rounded; whether all are finite."""
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        worst = max(worst, np.uint32(bits[i] & _SIZE))
        out[i] = np.uint32(bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return worst < _TOO_LARGE_FOR_BFLOAT16


@compiled(types.boolean(BITS, HALVES_OUT))
def to_float16(bits, out):
    """Float32 numbers as float16; whether all are finite."""
    worst = np.uint32(0)
    for i in range(bits.shape[0]):
        size = np.uint32(bits[i] & _SIZE)
        worst = max(worst, size)
        odd = (size >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32(np.uint32(size + _REBIAS_AND_ROUND + odd) >> np.uint32(13))
        subnormal = np.uint32(_as_bits(as_float(size) + as_float(_HALF)) - _HALF)
        half = subnormal if size < _FLOAT16_NORMAL else normal
        out[i] = half | np.uint32((bits[i] ^ size) >> np.uint32(16))
    return worst < _TOO_LARGE_FOR_FLOAT16


@njit(inline="always")
def _in_order(bits):
    """Bits of floats as integers in the order of the floats, -0.0 before 0.0; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@compiled(types.int64(BITS_2D, BYTES_OUT))
def to_int8(bits, out):
    """Rows as `embstore.quantize.pack` writes int8: codes, scale, bias; the first row of no finite span, or -1."""
    num_rows, width = bits.shape
    for i in range(num_rows):
        least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for d in range(width):  # the least of integers is found by SIMD, that of floats is not
            ordered = _in_order(np.int32(bits[i, d]))
            least, most = min(least, ordered), max(most, ordered)
        low = as_float(np.uint32(_in_order(least)))
        span = as_float(np.uint32(_in_order(most))) - low
        if not span < np.inf:
            return i
        inverse = np.float32(255) / (span + np.float32(1e-8))
        for d in range(width):
            out[i, d] = _as_bits((as_float(bits[i, d]) - low) * inverse + _ROUND)
        scale, bias = _as_bits(span / np.float32(255)), _as_bits(low)
        for k in range(4):
            out[i, width + k] = scale >> np.uint32(8 * k)
            out[i, width + 4 + k] = bias >> np.uint32(8 * k)
    return -1
