"""Lookups in one launch: tables in two parts, rows of hot ids and rows that the others share; rows by a stored map."""

# Shapes: B ids of a program, D columns of a program, H hot ids, C cold rows.

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from embstore.hashing import seed_offset
from embstore.kernels.cuda.rows import bucket, launch, mod, program, put, read_rows, tile_columns, tile_ids


@program
def _gather_split(
    ids, num_ids: tl.int64, out, cold, hot, num_hot: tl.int64, num_cold: tl.int64,
    ANY_COLD: tl.constexpr, SHARED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    hot_B = id_B < num_hot
    vectors_BD = read_rows(hot, tl.where(hot_B, id_B, 0), column_D, mask_BD & hot_B[:, None], WIDTH)
    if ANY_COLD:
        row_B = tl.where(hot_B, 0, id_B - num_hot)
        if SHARED:
            row_B = mod(row_B, num_cold)
        cold_BD = read_rows(cold, row_B, column_D, mask_BD & (id_B >= num_hot)[:, None], WIDTH)
        vectors_BD = tl.where(hot_B[:, None], vectors_BD, cold_BD)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_split(cold: Tensor, hot: Tensor, num_cold: int, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = hot[ids] where ids < H, else cold[(ids - H) mod num_cold], or cold[ids - H] where num_cold is 0.

    `hot` is float32; either may have no rows.
    """
    constants = {"ANY_COLD": len(cold) > 0, "SHARED": num_cold > 0}
    launch(_gather_split, ids_B, out_BD, cold, hot, len(hot), max(num_cold, 1), **constants)


@program
def _gather_hot(
    ids, num_ids: tl.int64, out, weight, num_hot: tl.int64, num_cold: tl.int64, offset: tl.int64,
    HASHED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    hot_B = id_B < num_hot
    shared_B = bucket(id_B, num_cold, offset) if HASHED else mod(tl.where(hot_B, 0, id_B - num_hot), num_cold)
    row_B = tl.where(hot_B, id_B, num_hot + shared_B)
    put(out, at_B, column_D, read_rows(weight, row_B, column_D, mask_BD, WIDTH), mask_BD, WIDTH)


def gather_hot_mod(weight: Tensor, num_hot: int, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[ids] where ids < H, else weight[H + (ids - H) mod C], C being the rows after the first H."""
    launch(_gather_hot, ids_B, out_BD, weight, num_hot, max(len(weight) - num_hot, 1), 0, HASHED=False)


def gather_hot_hash(weight: Tensor, num_hot: int, ids_B: Tensor, seed: int, out_BD: Tensor) -> None:
    """out = weight[ids] where ids < H, else weight[H + bucket(ids, C, seed)]."""
    num_cold = max(len(weight) - num_hot, 1)
    launch(_gather_hot, ids_B, out_BD, weight, num_hot, num_cold, seed_offset(seed), HASHED=True)


@program
def _gather_mapped(
    ids, num_ids: tl.int64, out, weight, row_of,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    row_B = tl.load(row_of + id_B).to(tl.int64)
    put(out, at_B, column_D, read_rows(weight, row_B, column_D, mask_BD, WIDTH), mask_BD, WIDTH)


def gather_mapped(weight: Tensor, row_of: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[row_of[ids]]; the caller checked that the map leads into the table."""
    launch(_gather_mapped, ids_B, out_BD, weight, row_of)
