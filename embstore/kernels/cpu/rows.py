"""Rows of a table in any storage dtype, read inside a compiled loop: the dtype is resolved when the loop is compiled.

`put_row`, `add_row` and their kin are what loops are made of; the arithmetic is the torch reference's, operation by
operation (no fused multiply-add), so results are equal bit for bit.
"""

# Shapes: R rows, P columns of the stored table, W floats of a row.

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from embstore.hashing import MUL1, MUL2
from embstore.kernels.cpu.prefetch import LINE_BYTES, as_float, prefetch

AHEAD = 16
"""How many ids a loop runs in front of itself: it asks for the rows it will compose so many steps later."""

FLOATS = types.Array(types.float32, 2, "C", readonly=True)
IDS = types.Array(types.int64, 1, "C", readonly=True, aligned=False)
OUT = types.Array(types.float32, 2, "C")
void, int64, float32 = types.void, types.int64, types.float32


@njit(inline="always")
def mod(id_, num_rows):
    """id mod num_rows, unsigned: ids are not negative."""
    return np.int64(np.uint64(id_) % np.uint64(num_rows))


@njit(inline="always")
def mix(key, offset):
    """`hashing.mix64` of a key, as uint64; offset is `hashing.seed_offset(seed)`."""
    z = np.uint64(key) + np.uint64(offset)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MUL2)
    return z ^ (z >> np.uint64(31))


@njit(inline="always")
def bucket(id_, num_rows, offset):
    """`hashing.bucket` of an id."""
    return np.int64(((mix(id_, offset) >> np.uint64(32)) * np.uint64(num_rows)) >> np.uint64(32))


def _per_line(table):
    """Elements of a table in one cache line, known when the loop is compiled."""


@overload(_per_line, inline="always")
def _compile_per_line(table):
    count = LINE_BYTES * 8 // table.dtype.bitwidth
    return lambda table: count


@njit(inline="always")
def prefetch_row(table, row):
    """Ask for every cache line of a row; the branches always go the same way, a loop's last one does not."""
    width, line = table.shape[1], _per_line(table)
    prefetch(table, row, 0)
    if width > line:
        prefetch(table, row, line)
    if width > 2 * line:
        prefetch(table, row, 2 * line)
    if width > 3 * line:
        prefetch(table, row, 3 * line)
    for column in range(4 * line, width, line):
        prefetch(table, row, column)
    if table.itemsize == 1:  # packed rows start anywhere in a line
        prefetch(table, row, width - 1)


@njit(inline="always")
def _half(bits):
    """The float32 of a float16's bits: its exponent moved, then rescaled, which also mends subnormals."""
    return as_float(((bits & np.uint32(0x7FFF)) << np.uint32(13)) | ((bits & np.uint32(0x8000)) << np.uint32(16))) * (
        as_float(np.uint32(0x77800000))
    )


@njit(inline="always")
def _word(table, row, at):
    return np.uint32(np.uint8(table[row, at])) | (np.uint32(np.uint8(table[row, at + 1])) << np.uint32(8))


def row_width(table):
    """Floats in a row of a table."""


@overload(row_width, inline="always")
def _row_width(table):
    if table.dtype == types.uint8:
        return lambda table: table.shape[1] - 8
    if table.dtype == types.int8:
        return lambda table: (table.shape[1] - 4) * 2
    return lambda table: table.shape[1]


def scale_bias(table, row):
    """Scale and bias of a packed row; 1 and 0 where numbers stand for themselves."""


@overload(scale_bias, inline="always")
def _scale_bias(table, row):
    if table.dtype == types.uint8:

        def floats(table, row):
            at = table.shape[1] - 8
            scale = as_float(_word(table, row, at) | (_word(table, row, at + 2) << np.uint32(16)))
            bias = as_float(_word(table, row, at + 4) | (_word(table, row, at + 6) << np.uint32(16)))
            return scale, bias

        return floats
    if table.dtype == types.int8:

        def halves(table, row):
            at = table.shape[1] - 4
            return _half(_word(table, row, at)), _half(_word(table, row, at + 2))

        return halves
    return lambda table, row: (np.float32(1), np.float32(0))


def element(table, row, d, scale, bias):
    """Float d of a row whose scale and bias were read; int4 goes through the row operations below."""


@overload(element, inline="always")
def _element(table, row, d, scale, bias):
    if table.dtype == types.float32:
        return lambda table, row, d, scale, bias: table[row, d]
    if table.dtype == types.int16:
        return lambda table, row, d, scale, bias: _half(np.uint32(np.uint16(table[row, d])))
    if table.dtype == types.uint16:
        return lambda table, row, d, scale, bias: as_float(np.uint32(table[row, d]) << np.uint32(16))
    if table.dtype == types.uint8:
        return lambda table, row, d, scale, bias: np.float32(table[row, d]) * scale + bias
    return lambda table, row, d, scale, bias: (
        np.float32((np.uint8(table[row, d >> 1]) >> np.uint8((d & 1) << 2)) & np.uint8(15)) * scale + bias
    )


def _row_operation(stub, combine):
    """Compile `stub(table, row, factor, out, i, at)`: out[i, at + d] = combine(out[i, at + d], element d, factor)."""

    @overload(stub, inline="always")
    def _compile(table, row, factor, out, i, at):
        if table.dtype == types.int8:

            def nibbles(table, row, factor, out, i, at):
                scale, bias = scale_bias(table, row)
                for j in range(table.shape[1] - 4):
                    byte = np.uint8(table[row, j])
                    low = np.float32(byte & np.uint8(15)) * scale + bias
                    high = np.float32(byte >> np.uint8(4)) * scale + bias
                    d = at + 2 * j
                    out[i, d] = combine(out[i, d], low, factor)
                    out[i, d + 1] = combine(out[i, d + 1], high, factor)

            return nibbles

        def elements(table, row, factor, out, i, at):
            scale, bias = scale_bias(table, row)
            for d in range(row_width(table)):
                out[i, at + d] = combine(out[i, at + d], element(table, row, d, scale, bias), factor)

        return elements


def put_row_scaled(table, row, factor, out, i, at):
    """out[i, at:] = row * factor."""


def add_row_scaled(table, row, factor, out, i, at):
    """out[i, at:] += row * factor."""


def _put(table, row, factor, out, i, at):
    """out[i, at:] = row."""


def _add(table, row, factor, out, i, at):
    """out[i, at:] += row."""


def _multiply(table, row, factor, out, i, at):
    """out[i, at:] *= row."""


_row_operation(put_row_scaled, njit(inline="always")(lambda old, new, factor: new * factor))
_row_operation(add_row_scaled, njit(inline="always")(lambda old, new, factor: old + new * factor))
_row_operation(_put, njit(inline="always")(lambda old, new, factor: new))
_row_operation(_add, njit(inline="always")(lambda old, new, factor: old + new))
_row_operation(_multiply, njit(inline="always")(lambda old, new, factor: old * new))


@njit(inline="always")
def put_row(table, row, out, i, at):
    """out[i, at:] = row."""
    _put(table, row, np.float32(1), out, i, at)


@njit(inline="always")
def add_row(table, row, out, i, at):
    """out[i, at:] += row."""
    _add(table, row, np.float32(1), out, i, at)


@njit(inline="always")
def multiply_row(table, row, out, i, at):
    """out[i, at:] *= row."""
    _multiply(table, row, np.float32(1), out, i, at)
