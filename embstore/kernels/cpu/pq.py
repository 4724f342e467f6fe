"""CPU loops of product quantisation: an id's codes name the parts of its vector.

The codes of one id are C bytes side by side, a cache line or less, and each loop asks for them AHEAD ids in front of
itself. The codebooks (C K rows of a part's width: 64 KB at K = 256, D = 64) stay in the processor's own cache:
nothing asks for them.

A rotation is linear, so rotating a vector is adding up its rotated parts. A large batch rotates the codebooks once
and adds up rows of D floats, a small one rotates its own parts. Both take the sums in the same order: what an id's
vector is does not depend on its batch, nor on the machine.
"""

# Shapes: B ids, D embedding_dim, C columns of codes (stages x parts), K codes of a column.

from __future__ import annotations

import numpy as np
from numba import njit, types

from embstore.kernels.cpu.compile import compiled, kernel
from embstore.kernels.cpu.rows import AHEAD, FLOATS, IDS, OUT, element, prefetch_row, row_width, scale_bias, void

u64 = np.uint64
"""Indices that cannot be negative: numba then leaves out the test for indices that count from the end, which costs
a third of the time of these short inner loops (1,000 ids x 16 parts of 4 floats: 21 us with it, 15 us without)."""

CODES = types.Array(types.uint8, 2, "C", readonly=True)

MAX_ROTATED_BYTES = 4 << 20
"""Rotated codebooks larger than a core's cache are no faster to add up than parts are to rotate."""


@njit(inline="always")
def _put_part(codebooks, row, width, add, out, i, at):
    """out[i, at:] = codebooks[row], or += where `add`. Four reads come before four writes: one vector instruction."""
    scale, bias = scale_bias(codebooks, row)
    d, end = u64(0), u64(width)
    while d + u64(4) <= end:  # `range` over unsigned steps divides to find its length
        a, b = element(codebooks, row, d, scale, bias), element(codebooks, row, d + u64(1), scale, bias)
        c, e = element(codebooks, row, d + u64(2), scale, bias), element(codebooks, row, d + u64(3), scale, bias)
        to = at + d
        if add:
            a, b = out[i, to] + a, out[i, to + u64(1)] + b
            c, e = out[i, to + u64(2)] + c, out[i, to + u64(3)] + e
        out[i, to], out[i, to + u64(1)], out[i, to + u64(2)], out[i, to + u64(3)] = a, b, c, e
        d += u64(4)
    while d < end:
        a = element(codebooks, row, d, scale, bias)
        out[i, at + d] = out[i, at + d] + a if add else a
        d += u64(1)


@njit(inline="always")
def _gather(codebooks, codes, ids, width, out):
    num_ids, num_columns, num_parts = ids.shape[0], u64(codes.shape[1]), u64(out.shape[1] // width)
    num_codes = u64(codebooks.shape[0] // codes.shape[1])
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            prefetch_row(codes, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            prefetch_row(codes, ids[i + AHEAD])
        if ids[i] < 0:
            continue
        id_, first = u64(ids[i]), u64(0)
        for part in range(num_parts):
            _put_part(codebooks, first + u64(codes[id_, part]), width, False, out, u64(i), part * u64(width))
            first += num_codes
        for stage in range(u64(1), num_columns // num_parts):
            for part in range(num_parts):
                row = first + u64(codes[id_, stage * num_parts + part])
                _put_part(codebooks, row, width, True, out, u64(i), part * u64(width))
                first += num_codes


@kernel(lambda table: void(table, CODES, IDS, OUT))
def _gather_any(codebooks, codes, ids, out):
    _gather(codebooks, codes, ids, row_width(codebooks), out)


def _gather_for(width):
    """The loop with the width as a literal: the compiler unrolls the parts, which makes it twice as fast."""

    def gather(codebooks, codes, ids, out):
        _gather(codebooks, codes, ids, width, out)

    return kernel(lambda table: void(table, CODES, IDS, OUT))(gather)


_GATHER = {width: _gather_for(width) for width in (2, 4, 8, 16)}


def gather_codes(codebooks, codes, ids, out):
    """out = the rows column * K + codes[ids, column] of the codebooks, side by side; further stages are added."""
    loop = _GATHER.get(codebooks.shape[1], _gather_any) if codebooks.dtype == np.float32 else _gather_any
    loop(codebooks, codes, ids, out)


def gather_codes_rotated(codebooks, codes, num_parts, rotation, ids, out):
    """out = what `gather_codes` gives, times the rotation.

    The loops of both ways run, one of them over nothing: a batch of another size never waits for a compiler.
    """
    num_rows, dim = codebooks.shape[0], out.shape[1]
    # Rotating the codebooks costs what rotating K vectors a stage does.
    large = len(ids) >= num_rows // num_parts and 4 * num_rows * dim <= MAX_ROTATED_BYTES
    rotated = np.empty((num_rows if large else 0, dim), np.float32)
    split = 0 if large else len(ids)
    _gather_rotating(codebooks, codes, rotation, ids[:split], out[:split])
    _rotate_codebooks(codebooks[: len(rotated)], num_rows // codes.shape[1], num_parts, rotation, rotated)
    _gather_rotated(rotated, codes, ids[split:], out[split:])


@njit(inline="always")
def _rotate_part(codebooks, row, width, rotation, at, out, i):
    """out[i] = codebooks[row] @ rotation[at : at + width]."""
    scale, bias = scale_bias(codebooks, row)
    dim, k, end = u64(out.shape[1]), u64(0), u64(width)
    while k + u64(4) <= end:  # four at a time: one store of the sums for four products
        a, b = element(codebooks, row, k, scale, bias), element(codebooks, row, k + u64(1), scale, bias)
        c, e = element(codebooks, row, k + u64(2), scale, bias), element(codebooks, row, k + u64(3), scale, bias)
        r = at + k
        for d in range(dim):
            total = a * rotation[r, d]
            if k > u64(0):
                total = out[i, d] + total
            total = total + b * rotation[r + u64(1), d]
            total = total + c * rotation[r + u64(2), d]
            out[i, d] = total + e * rotation[r + u64(3), d]
        k += u64(4)
    while k < end:
        a = element(codebooks, row, k, scale, bias)
        for d in range(dim):
            total = a * rotation[at + k, d]
            out[i, d] = out[i, d] + total if k > u64(0) else total
        k += u64(1)


@njit(inline="always")
def _add_rotated_four(codebooks, row, rotation, at, add, out, i):
    """out[i] = codebooks[row] @ rotation[at : at + 4], or += where `add`, without a detour through a buffer."""
    scale, bias = scale_bias(codebooks, row)
    a, b = element(codebooks, row, u64(0), scale, bias), element(codebooks, row, u64(1), scale, bias)
    c, e = element(codebooks, row, u64(2), scale, bias), element(codebooks, row, u64(3), scale, bias)
    for d in range(u64(out.shape[1])):
        total = a * rotation[at, d] + b * rotation[at + u64(1), d]
        total = total + c * rotation[at + u64(2), d]
        total = total + e * rotation[at + u64(3), d]
        out[i, d] = out[i, d] + total if add else total


@kernel(lambda table: void(table, CODES, FLOATS, IDS, OUT))
def _gather_rotating(codebooks, codes, rotation, ids, out):
    width, dim, num_columns = row_width(codebooks), u64(out.shape[1]), u64(codes.shape[1])
    num_codes = u64(codebooks.shape[0] // codes.shape[1])
    rotated = np.empty((1, out.shape[1]), np.float32)
    num_ids = ids.shape[0]
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            prefetch_row(codes, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            prefetch_row(codes, ids[i + AHEAD])
        if ids[i] < 0:
            continue
        id_, first, at = u64(ids[i]), u64(0), u64(0)
        for column in range(num_columns):
            row = first + u64(codes[id_, column])
            if width == 4:
                _add_rotated_four(codebooks, row, rotation, at, column > u64(0), out, u64(i))
            else:
                _rotate_part(codebooks, row, width, rotation, at, rotated, u64(0))
                for d in range(dim):
                    out[u64(i), d] = out[u64(i), d] + rotated[u64(0), d] if column > u64(0) else rotated[u64(0), d]
            first += num_codes
            at = at + u64(width) if at + u64(width) < dim else u64(0)


@kernel(lambda table: void(table, types.int64, types.int64, FLOATS, OUT))
def _rotate_codebooks(codebooks, num_codes, num_parts, rotation, rotated):
    width = row_width(codebooks)
    for row in range(codebooks.shape[0]):
        at = row // num_codes % num_parts * width
        _rotate_part(codebooks, u64(row), width, rotation, u64(at), rotated, u64(row))


@compiled(void(FLOATS, CODES, IDS, OUT))
def _gather_rotated(rotated, codes, ids, out):
    num_columns, dim = u64(codes.shape[1]), u64(out.shape[1])
    num_codes = u64(rotated.shape[0] // codes.shape[1])
    num_ids = ids.shape[0]
    for i in range(min(AHEAD, num_ids)):
        if ids[i] >= 0:
            prefetch_row(codes, ids[i])
    for i in range(num_ids):
        if i + AHEAD < num_ids and ids[i + AHEAD] >= 0:
            prefetch_row(codes, ids[i + AHEAD])
        if ids[i] < 0:
            continue
        id_, at, column = u64(ids[i]), u64(i), u64(0)
        while column + u64(4) <= num_columns:
            a = column * num_codes + u64(codes[id_, column])
            b = (column + u64(1)) * num_codes + u64(codes[id_, column + u64(1)])
            c = (column + u64(2)) * num_codes + u64(codes[id_, column + u64(2)])
            e = (column + u64(3)) * num_codes + u64(codes[id_, column + u64(3)])
            for d in range(dim):
                total = out[at, d] + rotated[a, d] if column > u64(0) else rotated[a, d]
                out[at, d] = ((total + rotated[b, d]) + rotated[c, d]) + rotated[e, d]
            column += u64(4)
        while column < num_columns:
            a = column * num_codes + u64(codes[id_, column])
            for d in range(dim):
                out[at, d] = out[at, d] + rotated[a, d] if column > u64(0) else rotated[a, d]
            column += u64(1)
