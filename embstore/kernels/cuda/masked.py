"""Rows of different widths that lie one after the other in one array, in one launch: a row is the start of a vector.

Ids of a block have rows of one width, so an id's row starts at `shifts[block] + id * widths[block]`. Ends, widths and
shifts of the blocks are constants of the kernel.
"""

# Shapes: B ids of a program, D columns of a program, K blocks of ids.

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.project import projection_row
from embstore.kernels.cuda.rows import launch, program, put, tile_columns, tile_ids


@triton.jit
def _rows(id_B, ENDS: tl.constexpr, WIDTHS: tl.constexpr, SHIFTS: tl.constexpr, K: tl.constexpr):
    """Where the ids' rows start, and how many numbers they have."""
    width_B = tl.full(id_B.shape, WIDTHS[0], tl.int64)
    shift_B = tl.full(id_B.shape, SHIFTS[0], tl.int64)
    for b in tl.static_range(1, K):
        after_B = id_B >= ENDS[b - 1]
        width_B = tl.where(after_B, WIDTHS[b], width_B)
        shift_B = tl.where(after_B, SHIFTS[b], shift_B)
    return shift_B + id_B * width_B, width_B


@program
def _prefix(
    ids, num_ids: tl.int64, out, values,
    ENDS: tl.constexpr, WIDTHS: tl.constexpr, SHIFTS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    start_B, width_B = _rows(id_B, ENDS, WIDTHS, SHIFTS, K)
    stored_BD = mask_BD & (column_D[None, :] < width_B[:, None])
    vectors_BD = tl.load(values + start_B[:, None] + column_D[None, :], mask=stored_BD, other=0.0)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


@program
def _prefix_rotated(
    ids, num_ids: tl.int64, out, values, rotation,
    ENDS: tl.constexpr, WIDTHS: tl.constexpr, SHIFTS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    start_B, width_B = _rows(id_B, ENDS, WIDTHS, SHIFTS, K)
    vectors_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for k in range(tl.max(width_B, axis=0)):  # rows shorter than the longest of the program add zeros
        factor_B = tl.load(values + start_B + k, mask=k < width_B, other=0.0)
        vectors_BD = vectors_BD + factor_B[:, None] * projection_row(rotation, k, column_D, WIDTH, BLOCK_B)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def _blocks(ends: Sequence[int], widths: Sequence[int], shifts: Sequence[int]) -> dict[str, object]:
    names = {"ENDS": ends, "WIDTHS": widths, "SHIFTS": shifts}
    return {name: tuple(int(value) for value in values) for name, values in names.items()} | {"K": len(ends)}


def prefix(
    values: Tensor, ends: Sequence[int], widths: Sequence[int], shifts: Sequence[int], ids_B: Tensor, out_BD: Tensor
) -> None:
    """out = the row of each id, then zeros."""
    launch(_prefix, ids_B, out_BD, values, **_blocks(ends, widths, shifts))


def prefix_rotated(
    values: Tensor, rotation: Tensor, ends: Sequence[int], widths: Sequence[int], shifts: Sequence[int],
    ids_B: Tensor, out_BD: Tensor,
) -> None:  # fmt: skip
    """out = the row of each id times as many rows of `rotation`, added in their order."""
    launch(_prefix_rotated, ids_B, out_BD, values, rotation, **_blocks(ends, widths, shifts))
