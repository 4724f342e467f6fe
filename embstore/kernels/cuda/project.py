"""Short rows times a projection, in one launch.

A program holds the sums of its tile and walks through the projection, which stays in the cache, a row at a time: the
sums are those of `cpu_project`, in its order, whatever the batch.
"""

# Shapes: B ids of a program, D columns of a program, R columns of a short row, K blocks of ids.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.rows import (
    elements,
    launch,
    program,
    put,
    read_rows,
    row_width,
    scale_bias,
    tile_columns,
    tile_ids,
)

UNROLLED = tl.constexpr(16)
"""Sums of up to so many products are spelt out; longer ones are loops."""


@triton.jit
def projection_row(projection, k, column_D, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Row k of a projection, [ROWS, D]. One row is enough, but in a loop only a load of the sums' own shape makes the
    compiler hold four columns side by side in a thread: half the loads, in spite of asking for the row many times."""
    return tl.load(
        projection + k * WIDTH + column_D[None, :] + tl.zeros((ROWS, 1), tl.int32),
        mask=(column_D < WIDTH)[None, :],
        other=0.0,
    )


@triton.jit
def _add_product(
    vectors_BD, k, rows, row_B, live_B, scale_B, bias_B, projection, column_D,
    RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """vectors + rows[row, k] * projection[k]."""
    factor_B = elements(rows, row_B, k + tl.zeros((BLOCK_B,), tl.int32), scale_B, bias_B, live_B, RANK)
    return vectors_BD + factor_B[:, None] * projection_row(projection, k, column_D, WIDTH, ROWS)


@triton.jit
def add_projected(
    vectors_BD, rows, row_B, live_B, projection, column_D,
    RANK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, IN_LOOP: tl.constexpr,
):  # fmt: skip
    """vectors + rows[row] @ projection. IN_LOOP: the caller's sums are a loop's."""
    scale_B, bias_B = scale_bias(rows, row_B, RANK)
    if RANK <= UNROLLED:
        for k in tl.static_range(RANK):
            vectors_BD = _add_product(
                vectors_BD, k, rows, row_B, live_B, scale_B, bias_B, projection, column_D,
                RANK, WIDTH, BLOCK_B, BLOCK_B if IN_LOOP else 1,
            )  # fmt: skip
    else:
        for k in range(RANK):
            vectors_BD = _add_product(
                vectors_BD, k, rows, row_B, live_B, scale_B, bias_B, projection, column_D,
                RANK, WIDTH, BLOCK_B, BLOCK_B,
            )  # fmt: skip
    return vectors_BD


@program
def _project(
    ids, num_ids: tl.int64, out, factors, projection, offset,
    RANK: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    if OFFSET:
        vectors_BD += tl.load(offset + column_D, mask=column_D < WIDTH, other=0.0)[None, :]
    vectors_BD = add_projected(vectors_BD, factors, id_B, found_B, projection, column_D, RANK, WIDTH, BLOCK_B, False)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def project(factors: Tensor, projection: Tensor, offset: Tensor | None, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = factors[ids] @ projection (+ offset[0])."""
    constants = {"RANK": row_width(factors), "OFFSET": offset is not None}
    launch(_project, ids_B, out_BD, factors, projection, projection if offset is None else offset, **constants)


@program
def _project_blocks(
    ids, num_ids: tl.int64, out, rows, projections,
    STARTS: tl.constexpr, SIZES: tl.constexpr, RANKS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for b in tl.static_range(K):
        inside_B = found_B & (id_B >= STARTS[b]) & (id_B < STARTS[b] + SIZES[b])
        if tl.max(inside_B.to(tl.int32), axis=0) > 0:  # most programs meet few of the blocks
            row_B = tl.where(inside_B, id_B - STARTS[b], 0)
            inside_BD = mask_BD & inside_B[:, None]
            if RANKS[b] == WIDTH:
                block_BD = read_rows(rows[b], row_B, column_D, inside_BD, WIDTH)
            else:
                zeros_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
                block_BD = add_projected(
                    zeros_BD, rows[b], row_B, inside_B, projections[b], column_D, RANKS[b], WIDTH, BLOCK_B, False
                )
            vectors_BD = tl.where(inside_BD, block_BD, vectors_BD)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def project_blocks(
    rows: Sequence[Tensor], projections: Sequence[Tensor | None], sizes: Sequence[int], ids_B: Tensor, out_BD: Tensor
) -> None:
    """out = rows[b][ids - first id of b] (@ projections[b] where there is one), for the block b that an id is in."""
    constants = {
        "STARTS": (0, *accumulate(sizes))[:-1],
        "SIZES": tuple(sizes),
        "RANKS": tuple(row_width(table) for table in rows),
        "K": len(rows),
    }
    matrices = tuple(table if matrix is None else matrix for table, matrix in zip(rows, projections, strict=True))
    launch(_project_blocks, ids_B, out_BD, tuple(rows), matrices, **constants)
