"""Several hashed rows an id in one launch: sums and concatenations, weighted or not, and MEM-REC's product.

Hash j of an id is `hashing.bucket(id, num_rows, seed + j)`.
"""

# Shapes: B ids of a program, D columns of a program, K hashes an id, S weight slots.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embstore.hashing import GAMMA, seed_offset
from embstore.kernels.cuda.rows import (
    bucket,
    columns_of_part,
    combine,
    launch,
    mod,
    program,
    put,
    read_rows,
    row_width,
    tile_columns,
    tile_ids,
)

NEXT_SEED = tl.constexpr(GAMMA)
"""What the hash's offset grows by from one seed to the next."""
UNROLLED = tl.constexpr(8)
"""Up to so many hashes are spelt out, so that all rows are asked for at once; 64 would take a minute to compile."""


@triton.jit
def _offset(offset, j):
    """`hashing.seed_offset` by the seed j after the one that `offset` belongs to."""
    return offset.to(tl.uint64) + (j + tl.zeros((1,), tl.int32)).to(tl.uint64) * NEXT_SEED


@triton.jit
def _take_hash(
    vectors_BD, j, weight, factors, id_B, num_rows, stride, num_slots, offset, column_D, mask_BD,
    FIRST: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, OP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`vectors` with the row of hash j taken in."""
    row_B = bucket(id_B, num_rows, _offset(offset, j)) + j * stride
    part_D, part_BD = columns_of_part(column_D, mask_BD, j, OP, PART)
    row_BD = read_rows(weight, row_B, part_D, part_BD, PART)
    if WEIGHTED:
        row_BD = row_BD * tl.load(factors + mod(id_B, num_slots) * K + j)[:, None]
    return combine(vectors_BD, row_BD, part_BD, FIRST, OP)


@triton.jit
def _take_hashes(
    vectors_BD, weight, factors, id_B, num_rows, stride, num_slots, offset, column_D, mask_BD,
    K: tl.constexpr, WEIGHTED: tl.constexpr, OP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The rows of all hashes, combined; `vectors` are zeros."""
    vectors_BD = _take_hash(
        vectors_BD, 0, weight, factors, id_B, num_rows, stride, num_slots, offset, column_D, mask_BD,
        True, K, WEIGHTED, OP, PART,
    )  # fmt: skip
    if K <= UNROLLED:
        for j in tl.static_range(1, K):
            vectors_BD = _take_hash(
                vectors_BD, j, weight, factors, id_B, num_rows, stride, num_slots, offset, column_D, mask_BD,
                False, K, WEIGHTED, OP, PART,
            )  # fmt: skip
    else:
        for j in range(1, K):
            vectors_BD = _take_hash(
                vectors_BD, j, weight, factors, id_B, num_rows, stride, num_slots, offset, column_D, mask_BD,
                False, K, WEIGHTED, OP, PART,
            )  # fmt: skip
    return vectors_BD


@program
def _gather_hashes(
    ids, num_ids: tl.int64, out, weight, factors,
    num_rows: tl.int64, stride: tl.int64, num_slots: tl.int64, offset: tl.int64,
    K: tl.constexpr, WEIGHTED: tl.constexpr, OP: tl.constexpr, PART: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = _take_hashes(
        tl.zeros((BLOCK_B, BLOCK_D), tl.float32), weight, factors, id_B, num_rows, stride, num_slots, offset,
        column_D, mask_BD, K, WEIGHTED, OP, PART,
    )  # fmt: skip
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_hashes(
    weight: Tensor, factors: Tensor | None, ids_B: Tensor, seed: int, num_hashes: int, num_rows: int,
    *, shared: bool, concat: bool, out_BD: Tensor,
) -> None:  # fmt: skip
    """out = sum (or concatenation) over j < K of weight[bucket(ids, num_rows, seed + j)] (* factors[ids mod S, j]).

    shared: every hash reads the same `num_rows` rows; else hash j reads those from `j * num_rows` on.
    """
    numbers = (num_rows, 0 if shared else num_rows, 1 if factors is None else len(factors), seed_offset(seed))
    constants = {"K": num_hashes, "OP": "concat" if concat else "add", "PART": row_width(weight)}
    own = weight if factors is None else factors
    launch(_gather_hashes, ids_B, out_BD, weight, own, *numbers, WEIGHTED=factors is not None, **constants)


@program
def _gather_mem_rec(
    ids, num_ids: tl.int64, out, tokens, weights, num_rows: tl.int64, num_weights: tl.int64, offset: tl.int64,
    K: tl.constexpr, K_WEIGHTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = _take_hashes(
        tl.zeros((BLOCK_B, BLOCK_D), tl.float32), tokens, tokens, id_B, num_rows, 0, num_rows, offset,
        column_D, mask_BD, K, False, "add", WIDTH,
    )  # fmt: skip
    factor_B = tl.load(weights + bucket(id_B, num_weights, _offset(offset, K)))
    for j in range(K + 1, K + K_WEIGHTS):
        factor_B += tl.load(weights + bucket(id_B, num_weights, _offset(offset, j)))
    put(out, at_B, column_D, vectors_BD * factor_B[:, None], mask_BD, WIDTH)


def gather_mem_rec(
    tokens: Tensor, weights: Tensor, ids_B: Tensor, seed: int, num_hashes: int, num_weight_hashes: int, out_BD: Tensor
) -> None:
    """out = (sum of the hashed rows of `tokens`) * (sum of the hashed numbers of `weights`)."""
    numbers = (len(tokens), len(weights), seed_offset(seed))
    launch(_gather_mem_rec, ids_B, out_BD, tokens, weights, *numbers, K=num_hashes, K_WEIGHTS=num_weight_hashes)
