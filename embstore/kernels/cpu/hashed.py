"""CPU loops over several hashed rows an id: multi-hash sums and concatenations, weighted or not, and MEM-REC's product.

Hash j of an id is `hashing.bucket(id, num_rows, seed + j)`. All rows of an id are asked for AHEAD ids before they are
composed. A negative id leaves its row of `out` untouched.

The hashes' offsets are a tuple, so a loop is compiled for their number, and rows are added in pairs, one pass over the
output for two of them: with neither, a sum of two takes a third longer (16,384 Zipf ids x 64 floats: 495 us, 600).
"""

# Shapes: B ids, D embedding_dim, K hashes an id, R rows of tables, S weight slots.

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from embstore.hashing import seed_offset
from embstore.kernels.cpu.compile import Kernel
from embstore.kernels.cpu.prefetch import prefetch
from embstore.kernels.cpu.rows import (
    AHEAD,
    FLOATS,
    IDS,
    OUT,
    add_row,
    add_row_scaled,
    bucket,
    element,
    int64,
    mod,
    prefetch_row,
    put_row,
    put_row_scaled,
    row_width,
    void,
)

ONE, ZERO = np.float32(1), np.float32(0)
PACKED = (types.uint8, types.int8)
"""Rows of these are added one by one: a scale and a bias a row are work enough, and two at a time long to compile."""


def _put_sum(table, ring, slot, num_rows, out, i):
    """out[i] = the sum of the rows, first to last."""


@overload(_put_sum)
def _compile_put_sum(table, ring, slot, num_rows, out, i):  # noqa: ARG001
    if table.dtype in PACKED:

        def one_by_one(table, ring, slot, num_rows, out, i):
            put_row(table, ring[slot, 0], out, i, 0)
            for j in range(1, num_rows):
                add_row(table, ring[slot, j], out, i, 0)

        return one_by_one

    def in_pairs(table, ring, slot, num_rows, out, i):
        if num_rows % 2:
            put_row(table, ring[slot, 0], out, i, 0)
        else:
            a, b = ring[slot, 0], ring[slot, 1]
            for d in range(out.shape[1]):
                out[i, d] = element(table, a, d, ONE, ZERO) + element(table, b, d, ONE, ZERO)
        for j in range(2 - num_rows % 2, num_rows, 2):
            a, b = ring[slot, j], ring[slot, j + 1]
            for d in range(out.shape[1]):
                out[i, d] = (out[i, d] + element(table, a, d, ONE, ZERO)) + element(table, b, d, ONE, ZERO)

    return in_pairs


def _put_sum_scaled(table, factors, own, ring, slot, num_rows, out, i):
    """out[i] = the sum of the rows times their factors, first to last."""


@overload(_put_sum_scaled)
def _compile_put_sum_scaled(table, factors, own, ring, slot, num_rows, out, i):  # noqa: ARG001
    if table.dtype in PACKED:

        def one_by_one(table, factors, own, ring, slot, num_rows, out, i):
            put_row_scaled(table, ring[slot, 0], factors[own, 0], out, i, 0)
            for j in range(1, num_rows):
                add_row_scaled(table, ring[slot, j], factors[own, j], out, i, 0)

        return one_by_one

    def in_pairs(table, factors, own, ring, slot, num_rows, out, i):
        if num_rows % 2:
            put_row_scaled(table, ring[slot, 0], factors[own, 0], out, i, 0)
        else:
            a, b, f, g = ring[slot, 0], ring[slot, 1], factors[own, 0], factors[own, 1]
            for d in range(out.shape[1]):
                out[i, d] = element(table, a, d, ONE, ZERO) * f + element(table, b, d, ONE, ZERO) * g
        for j in range(2 - num_rows % 2, num_rows, 2):
            a, b, f, g = ring[slot, j], ring[slot, j + 1], factors[own, j], factors[own, j + 1]
            for d in range(out.shape[1]):
                out[i, d] = (out[i, d] + element(table, a, d, ONE, ZERO) * f) + element(table, b, d, ONE, ZERO) * g

    return in_pairs


@njit(inline="always")
def _prefetch_hashed(table, id_, num_rows, offset, start):
    """The row of one hash of an id; the processor is asked for it. The loop over hashes, in here, would be slower."""
    row = np.uint64(start) + np.uint64(bucket(id_, num_rows, offset))
    prefetch_row(table, row)
    return row


def _sum(weight, offsets, ids, num_rows, stride, out):
    num_ids = ids.shape[0]
    ring = np.empty((AHEAD, len(offsets)), np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            _put_sum(weight, ring, slot, len(offsets), out, i)
        if step < num_ids and ids[step] >= 0:
            for j in range(len(offsets)):
                ring[slot, j] = _prefetch_hashed(weight, ids[step], num_rows, offsets[j], j * stride)


def _concat(weight, offsets, ids, num_rows, stride, out):
    num_ids = ids.shape[0]
    ring = np.empty((AHEAD, len(offsets)), np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            for j in range(len(offsets)):
                put_row(weight, ring[slot, j], out, i, j * row_width(weight))
        if step < num_ids and ids[step] >= 0:
            for j in range(len(offsets)):
                ring[slot, j] = _prefetch_hashed(weight, ids[step], num_rows, offsets[j], j * stride)


def _sum_weighted(weight, factors, offsets, ids, num_rows, stride, out):
    num_ids, num_slots = ids.shape[0], factors.shape[0]
    ring, own = np.empty((AHEAD, len(offsets)), np.uint64), np.empty(AHEAD, np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            _put_sum_scaled(weight, factors, own[slot], ring, slot, len(offsets), out, i)
        if step < num_ids and ids[step] >= 0:
            own[slot] = np.uint64(mod(ids[step], num_slots))
            prefetch(factors, own[slot], 0)
            for j in range(len(offsets)):
                ring[slot, j] = _prefetch_hashed(weight, ids[step], num_rows, offsets[j], j * stride)


def _concat_weighted(weight, factors, offsets, ids, num_rows, stride, out):
    num_ids, num_slots = ids.shape[0], factors.shape[0]
    ring, own = np.empty((AHEAD, len(offsets)), np.uint64), np.empty(AHEAD, np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            for j in range(len(offsets)):
                put_row_scaled(weight, ring[slot, j], factors[own[slot], j], out, i, j * row_width(weight))
        if step < num_ids and ids[step] >= 0:
            own[slot] = np.uint64(mod(ids[step], num_slots))
            prefetch(factors, own[slot], 0)
            for j in range(len(offsets)):
                ring[slot, j] = _prefetch_hashed(weight, ids[step], num_rows, offsets[j], j * stride)


def _product(tokens, weights, offsets, weight_offsets, ids, out):
    num_ids, width = ids.shape[0], out.shape[1]
    ring = np.empty((AHEAD, len(offsets)), np.uint64)
    own = np.empty((AHEAD, len(weight_offsets)), np.uint64)
    for step in range(num_ids + AHEAD):
        slot = step % AHEAD
        i = step - AHEAD
        if i >= 0 and ids[i] >= 0:
            factor = weights[own[slot, 0], 0]
            for j in range(1, len(weight_offsets)):
                factor += weights[own[slot, j], 0]
            _put_sum(tokens, ring, slot, len(offsets), out, i)
            for d in range(width):
                out[i, d] *= factor
        if step < num_ids and ids[step] >= 0:
            for j in range(len(weight_offsets)):
                own[slot, j] = np.uint64(bucket(ids[step], weights.shape[0], weight_offsets[j]))
                prefetch(weights, own[slot, j], 0)
            for j in range(len(offsets)):
                ring[slot, j] = _prefetch_hashed(tokens, ids[step], tokens.shape[0], offsets[j], 0)


@cache
def _offsets(seed: int, num_hashes: int) -> tuple[int, ...]:
    return tuple(seed_offset(seed + j) for j in range(num_hashes))


@cache
def _plain(num_hashes: int, concat: bool) -> Kernel:
    offsets = types.UniTuple(int64, num_hashes)
    return Kernel(_concat if concat else _sum, lambda table: void(table, offsets, IDS, int64, int64, OUT))


@cache
def _weighted(num_hashes: int, concat: bool) -> Kernel:
    offsets = types.UniTuple(int64, num_hashes)
    loop = _concat_weighted if concat else _sum_weighted
    return Kernel(loop, lambda table: void(table, FLOATS, offsets, IDS, int64, int64, OUT))


@cache
def _mem_rec(num_hashes: int, num_weight_hashes: int) -> Kernel:
    offsets, weight_offsets = types.UniTuple(int64, num_hashes), types.UniTuple(int64, num_weight_hashes)
    return Kernel(_product, lambda table: void(table, FLOATS, offsets, weight_offsets, IDS, OUT))


def gather_hashes(
    weight: Any, factors: Any, ids: Any, seed: int, num_hashes: int, num_rows: int, shared: bool, concat: bool, out: Any
) -> None:
    """out = sum (or concatenation) over j < K of weight[bucket(ids, num_rows, seed + j)] (* factors[ids mod S, j]).

    shared: every hash reads the same `num_rows` rows; else hash j reads those from `j * num_rows` on.
    """
    offsets, stride = _offsets(seed, num_hashes), 0 if shared else num_rows
    if factors is None:
        _plain(num_hashes, concat)(weight, offsets, ids, num_rows, stride, out)
    else:
        _weighted(num_hashes, concat)(weight, factors, offsets, ids, num_rows, stride, out)


def gather_mem_rec(
    tokens: Any, weights: Any, ids: Any, seed: int, num_hashes: int, num_weight_hashes: int, out: Any
) -> None:
    """out = (sum of the hashed rows of `tokens`) * (sum of the hashed numbers of `weights`).

    Rows by the seeds `seed .. seed + num_hashes - 1`, numbers by the `num_weight_hashes` seeds after them.
    """
    offsets, weight_offsets = _offsets(seed, num_hashes), _offsets(seed + num_hashes, num_weight_hashes)
    _mem_rec(num_hashes, num_weight_hashes)(tokens, weights, offsets, weight_offsets, ids, out)
