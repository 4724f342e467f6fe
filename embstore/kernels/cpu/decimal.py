"""Float32 numbers as JSON: the fewest digits that read back as the same number, and of those the nearest to it.

The digits are those of Schubfach (Giulietti, "The Schubfach way to render doubles", 2020), for 32 bits: a number and
the two ends of what rounds to it are scaled by one power of ten, so that their integer parts hold the digits.

The text is that of orjson, byte for byte, for each of the 2^32 numbers: `0.1`, `-1.0`, `1e-6`, `3.4028235e+38`; `null`
for what is not finite. What is ours: less than half of its time, and no GIL held.

`_analyse` has no branch, so that it becomes SIMD; all its integers lie in lanes of 64 bits. `_put_number` is left with
where to write what.
"""

# Shapes: B rows, D columns, N numbers at a time.

from __future__ import annotations

from fractions import Fraction
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from embstore.kernels.cpu.compile import compiled
from embstore.kernels.cpu.wire import BITS

TEXT = types.Array(types.uint8, 1, "C")
MOST_BYTES = 18
"""Of one number and its comma: `-0.00000123456789,`. What is written behind a shorter one ends within it too."""
AT_ONCE = 256

_FIXED_FROM, _FIXED_TO = -5, 13
"""Places before the point of numbers that are written without an exponent."""


def _floor_log(base: int, value: Fraction) -> int:
    """The highest e with base ** e <= value."""
    e = 0
    while Fraction(base) ** (e + 1) <= value:
        e += 1
    while Fraction(base) ** e > value:
        e -= 1
    return e


def _tables() -> tuple[Any, Any]:
    """For 2 * biased exponent (+ 1: a power of two, whose neighbour below is half as far): the scale, a power of ten in
    64 bits, rounded up; and the exponent of the last digit times 64, plus what a significand is shifted by before."""
    scales, others = np.zeros(512, np.uint64), np.zeros(512, np.int64)
    for biased in range(255):
        two = Fraction(2) ** (max(biased, 1) - 150)
        for close_below in (0, 1):
            power = _floor_log(10, two * Fraction(3, 4) if close_below else two)
            ten = Fraction(10) ** -power
            bits = _floor_log(2, ten)
            at = 2 * biased + close_below
            scales[at] = -(-ten * Fraction(2) ** 63 // Fraction(2) ** bits)
            others[at] = 64 * power + max(biased, 1) - 150 + bits + 1
    return scales, others


_SCALES, _POWERS_AND_SHIFTS = _tables()
_LOW_32, _U32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_0, _1, _2, _4, _100 = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(100)
_SMALL = np.uint64(1_000_000)
"""Less than seven digits: rare, but for numbers that people wrote."""
_ZERO, _POINT, _MINUS, _COMMA, _E, _OPEN, _CLOSE, _PLUS = (np.uint8(ord(sign)) for sign in "0.-,e[]+")
_NULL, _ZEROS = np.frombuffer(b"null    0.000000", "<u8")


@intrinsic
def put_word(typing_context: Any, out: Any, at: Any, word: Any) -> Any:  # noqa: ARG001
    """Write eight bytes at `at`, the lowest first."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array = context.make_array(sig.args[0])(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, sig.args[0], array, [args[1]])
        builder.store(args[2], builder.bitcast(pointer, ir.IntType(64).as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.uint64), emit


@njit(inline="always")
def _scaled(scale, number):
    """floor(scale * number / 2^64) of a number below 2^32, the last bit set where that was rounded."""
    product = (scale >> _U32) * number + (((scale & _LOW_32) * number) >> _U32)
    return (product >> _U32) | np.uint64((product & _LOW_32) > _1)


@njit(inline="always")
def _over(number, factor, shift):
    """A quotient of numbers below 2^32, by multiplication."""
    return ((number & _LOW_32) * np.uint64(factor)) >> np.uint64(shift)


@njit(inline="always")
def _nine_digits(number):
    """The text of a number below 10^9: its first digit, and the others as eight bytes, the first lowest."""
    first = _over(number, 1441151881, 57)  # / 10^8
    eight = number - (first & _LOW_32) * np.uint64(100_000_000)
    fours = _over(eight, 3518437209, 45)  # / 10^4
    parts = fours | ((eight - np.uint64(10_000) * (fours & _LOW_32)) << _U32)  # each step splits all parts in two
    hundreds = ((parts * np.uint64(10_486)) >> np.uint64(20)) & np.uint64(0x7F0000007F)
    parts = hundreds | ((parts - _100 * hundreds) << np.uint64(16))
    tens = ((parts * np.uint64(103)) >> np.uint64(10)) & np.uint64(0x000F000F000F000F)
    return first + np.uint64(48), (tens | ((parts - np.uint64(10) * tens) << np.uint64(8))) + np.uint64(
        0x3030303030303030
    )


@njit(inline="always")
def _analyse(bits, start, num, digits_N, powers_N, firsts_N, others_N):
    """Of `num` numbers from `start`: digits * 10 ** power, and where there are at least seven digits, their text."""
    for i in range(num):
        number = bits[start + i]
        fraction = np.uint64(number & np.uint32(0x7FFFFF))
        biased = np.uint64((number >> np.uint32(23)) & np.uint32(0xFF))
        close_below = np.uint64((fraction == _0) & (biased > _1))
        at = _2 * biased + close_below
        scale, power_and_shift = _SCALES[at], _POWERS_AND_SHIFTS[at]
        shift = np.uint64(power_and_shift & 63)
        odd = fraction & _1
        middle = _4 * (fraction | (np.uint64(biased > _0) << np.uint64(23)))
        below = _scaled(scale, ((middle - _2 + close_below) << shift) & _LOW_32) + odd
        value = _scaled(scale, (middle << shift) & _LOW_32)
        above = _scaled(scale, ((middle + _2) << shift) & _LOW_32) - odd

        exact = value >> _2
        half = _4 * exact + _2
        up = (value > half) | ((value == half) & ((exact & _1) != _0))
        fits, next_fits = below <= _4 * exact, _4 * exact + _4 <= above
        exact += np.uint64(next_fits if fits != next_fits else up)

        shorter = _over(value, 0xCCCCCCCD, 37)  # / 40
        fits, next_fits = below <= np.uint64(40) * shorter, np.uint64(40) * shorter + np.uint64(40) <= above
        is_shorter = (fits != next_fits) & (value >= np.uint64(40))
        digits = shorter + np.uint64(next_fits) if is_shorter else exact
        digits_N[i] = digits
        powers_N[i] = (power_and_shift >> 6) + np.int64(is_shorter)
        ten = _1 if digits >= _SMALL * _100 else np.uint64(10) if digits >= _SMALL * np.uint64(10) else _100
        firsts_N[i], others_N[i] = _nine_digits(digits * ten)


@njit(inline="always")
def _put_number(out, at, bits, digits, power, first, others):
    """Write one number at `at`, and some bytes after it; where it ends."""
    size = bits & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(0x7F800000):
        put_word(out, at, _NULL)
        return at + 4
    out[at] = _MINUS
    at += np.int64(bits >> np.uint32(31))
    if not size:
        put_word(out, at, _ZEROS)
        return at + 3
    if digits >= _SMALL:
        count = 7 + np.int64(digits >= _SMALL * np.uint64(10)) + np.int64(digits >= _SMALL * _100)
    else:
        count, nine = np.int64(9), digits
        while nine < np.uint64(100_000_000):
            nine *= np.uint64(10)
            count -= 1
        first, others = _nine_digits(nine)
    point = count + power
    while digits % np.uint64(10) == _0:
        digits //= np.uint64(10)
        count -= 1
    if _FIXED_FROM <= point <= 0:
        put_word(out, at, _ZEROS)
        at += 2 - point
        out[at] = first
        put_word(out, at + 1, others)
        return at + count
    if 0 < point < count:
        out[at] = first
        put_word(out, at + 2, others)
        for i in range(at + 1, at + point):
            out[i] = out[i + 1]
        out[at + point] = _POINT
        return at + count + 1
    out[at] = first
    if 0 < point <= _FIXED_TO:
        put_word(out, at + 1, others)
        for i in range(at + count, at + point):
            out[i] = _ZERO
        out[at + point], out[at + point + 1] = _POINT, _ZERO
        return at + point + 2
    out[at + 1] = _POINT
    put_word(out, at + 2, others)
    at += count + np.int64(count > 1)
    exponent = point - 1
    out[at], out[at + 1] = _E, _MINUS if exponent < 0 else _PLUS
    at, exponent = at + 2, abs(exponent)
    if exponent >= 10:
        out[at] = _ZERO + np.uint8(exponent // 10)
        at += 1
    out[at] = _ZERO + np.uint8(exponent % 10)
    return at + 1


@compiled(types.int64(BITS, types.int64, TEXT))
def put_numbers(bits, width, out):
    """Write `[...]`, and with a width `[[...],[...]]`, `width` numbers in each; how many bytes that is.

    `out` has room for MOST_BYTES a number, 2 a row, and 2. Numbers are a multiple of `width`.
    """
    digits_N, powers_N = np.empty(AT_ONCE, np.uint64), np.empty(AT_ONCE, np.int64)
    firsts_N, others_N = np.empty(AT_ONCE, np.uint64), np.empty(AT_ONCE, np.uint64)
    out[0] = _OPEN
    at, left = np.int64(1), np.int64(0)
    for start in range(0, len(bits), AT_ONCE):
        num = min(AT_ONCE, len(bits) - start)
        _analyse(bits, start, num, digits_N, powers_N, firsts_N, others_N)
        for i in range(num):
            if width and not left:
                out[at] = _OPEN
                at, left = at + 1, width
            number = bits[start + i]
            at = _put_number(out, at, number, digits_N[i], powers_N[i], firsts_N[i], others_N[i])
            left -= 1
            if width and not left:
                out[at] = _CLOSE
                at += 1
            out[at] = _COMMA
            at += 1
    at -= np.int64(len(bits) > 0)
    out[at] = _CLOSE
    return at + 1
