"""CPU loops of complementary partitions: k rows of one stacked table are multiplied, added or laid side by side.

Partition j owns the rows from `moduli[0] + ... + moduli[j - 1]` on. Its index is digit j of the id in the mixed radix
of the moduli, or the id modulo moduli[j] (Chinese remainder). Digits are divided off one after the other, so no
product of moduli is ever formed, and the last digit is what is left: a pair costs one division.

Moduli are a tuple, so a loop is compiled for their number, and the choice of radix or remainders is compiled in. The
first two rows are combined in one pass over the output. 1,000 (16,384) Zipf ids x 64 floats, `mult` of two partitions,
on one AMD Zen 4 core: 19 us (290); a loop around the prefetches costs 5 (60) more, a ring of 8 in place of 16 costs 3
(50) more.
"""

# Shapes: B ids, D embedding_dim, K partitions, R rows of the stacked table.

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from embstore.kernels.cpu.compile import Kernel
from embstore.kernels.cpu.rows import (
    AHEAD,
    IDS,
    OUT,
    add_row,
    element,
    multiply_row,
    prefetch_row,
    put_row,
    row_width,
    scale_bias,
    void,
)

u64 = np.uint64


@njit(inline="always")
def _digits(id_, moduli, table, ring, slot):
    """ring[slot] = the rows of an id by mixed radix; the processor is asked for them."""
    rest, start = u64(id_), u64(0)
    for j in range(len(moduli) - 1):
        quotient = rest // u64(moduli[j])
        row = start + (rest - quotient * u64(moduli[j]))
        ring[slot, j] = row
        prefetch_row(table, row)
        start += u64(moduli[j])
        rest = quotient
    ring[slot, len(moduli) - 1] = start + rest
    prefetch_row(table, start + rest)


@njit(inline="always")
def _remainders(id_, moduli, table, ring, slot):
    """ring[slot] = the rows of an id by Chinese remainders; the processor is asked for them."""
    start = u64(0)
    for j in range(len(moduli)):
        row = start + u64(id_) % u64(moduli[j])
        ring[slot, j] = row
        prefetch_row(table, row)
        start += u64(moduli[j])


def _put_product(table, first, second, out, i):
    """out[i] = row first * row second."""


def _put_sum(table, first, second, out, i):
    """out[i] = row first + row second."""


def _pair_operation(stub, combine, then):
    """Compile `stub(table, first, second, out, i)`; int4, two numbers a byte, goes row by row."""

    @overload(stub, inline="always")
    def _compile(table, first, second, out, i):  # noqa: ARG001
        if table.dtype == types.int8:

            def rows(table, first, second, out, i):
                put_row(table, first, out, i, 0)
                then(table, second, out, i, 0)

            return rows

        def elements(table, first, second, out, i):
            scale_a, bias_a = scale_bias(table, first)
            scale_b, bias_b = scale_bias(table, second)
            for d in range(row_width(table)):
                a = element(table, first, d, scale_a, bias_a)
                out[i, d] = combine(a, element(table, second, d, scale_b, bias_b))

        return elements


_pair_operation(_put_product, njit(inline="always")(lambda a, b: a * b), multiply_row)
_pair_operation(_put_sum, njit(inline="always")(lambda a, b: a + b), add_row)


@njit(inline="always")
def _multiply(table, ring, slot, num_parts, out, i):
    _put_product(table, ring[slot, 0], ring[slot, 1], out, i)
    for j in range(2, num_parts):
        multiply_row(table, ring[slot, j], out, i, 0)


@njit(inline="always")
def _add(table, ring, slot, num_parts, out, i):
    _put_sum(table, ring[slot, 0], ring[slot, 1], out, i)
    for j in range(2, num_parts):
        add_row(table, ring[slot, j], out, i, 0)


@njit(inline="always")
def _concat(table, ring, slot, num_parts, out, i):
    for j in range(num_parts):
        put_row(table, ring[slot, j], out, i, j * row_width(table))


@njit(inline="always")
def _loop(resolve, combine, weight, moduli, ids, out):
    num_ids = ids.shape[0]
    ring = np.empty((AHEAD, len(moduli)), np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            combine(weight, ring, slot, len(moduli), out, i)
        if step < num_ids and ids[step] >= 0:
            resolve(ids[step], moduli, weight, ring, slot)


def multiply_radix(weight, moduli, ids, out):
    """out = (row_1 * row_2) * row_3 ..."""
    _loop(_digits, _multiply, weight, moduli, ids, out)


def multiply_crt(weight, moduli, ids, out):
    """out = (row_1 * row_2) * row_3 ..."""
    _loop(_remainders, _multiply, weight, moduli, ids, out)


def add_radix(weight, moduli, ids, out):
    """out = (row_1 + row_2) + row_3 ..."""
    _loop(_digits, _add, weight, moduli, ids, out)


def add_crt(weight, moduli, ids, out):
    """out = (row_1 + row_2) + row_3 ..."""
    _loop(_remainders, _add, weight, moduli, ids, out)


def concat_radix(weight, moduli, ids, out):
    """out = [row_1, row_2, ...]"""
    _loop(_digits, _concat, weight, moduli, ids, out)


def concat_crt(weight, moduli, ids, out):
    """out = [row_1, row_2, ...]"""
    _loop(_remainders, _concat, weight, moduli, ids, out)


_LOOPS = {
    ("mult", "radix"): multiply_radix,
    ("mult", "crt"): multiply_crt,
    ("add", "radix"): add_radix,
    ("add", "crt"): add_crt,
    ("concat", "radix"): concat_radix,
    ("concat", "crt"): concat_crt,
}


@cache
def _kernel(op: str, partition: str, num_partitions: int) -> Kernel:
    moduli = types.UniTuple(types.int64, num_partitions)
    return Kernel(_LOOPS[op, partition], lambda table: void(table, moduli, IDS, OUT))


def gather_partitions(op: str, partition: str, weight: Any, moduli: tuple[int, ...], ids: Any, out: Any) -> None:
    """out = the rows of every id's partitions, of which there are at least two, combined by `op`."""
    _kernel(op, partition, len(moduli))(weight, moduli, ids, out)
