"""Lookups in one launch: schemes that read one row an id, and MEmCom's row times a number."""

# Shapes: B ids of a program, D columns of a program, M rows of a table.

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from embstore.hashing import seed_offset
from embstore.kernels.cuda.rows import bucket, launch, mod, program, put, read_rows, tile_columns, tile_ids


@program
def _gather(
    ids, num_ids: tl.int64, out, weight, num_rows: tl.int64, offset: tl.int64,
    HOW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    row_B = id_B
    if HOW == "mod":
        row_B = mod(id_B, num_rows)
    elif HOW == "hash":
        row_B = bucket(id_B, num_rows, offset)
    put(out, at_B, column_D, read_rows(weight, row_B, column_D, mask_BD, WIDTH), mask_BD, WIDTH)


def gather(weight: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[ids]."""
    launch(_gather, ids_B, out_BD, weight, 1, 0, HOW="row")


def gather_mod(weight: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[ids mod M]."""
    launch(_gather, ids_B, out_BD, weight, len(weight), 0, HOW="mod")


def gather_hash(weight: Tensor, ids_B: Tensor, seed: int, out_BD: Tensor) -> None:
    """out = weight[bucket(ids, M, seed)]."""
    launch(_gather, ids_B, out_BD, weight, len(weight), seed_offset(seed), HOW="hash")


@program
def _gather_scaled(
    ids, num_ids: tl.int64, out, shared, own, shift, num_rows: tl.int64,
    BIAS: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = read_rows(shared, mod(id_B, num_rows), column_D, mask_BD, WIDTH)
    vectors_BD = vectors_BD * tl.load(own + id_B * (1 + BIAS))[:, None]
    if BIAS:
        vectors_BD = vectors_BD + tl.load(own + id_B * 2 + 1)[:, None]
    if SHIFT:
        vectors_BD = vectors_BD + tl.load(shift + column_D, mask=column_D < WIDTH, other=0.0)[None, :]
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_scaled(shared: Tensor, own: Tensor, shift: Tensor | None, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = shared[ids mod M] * own[ids, 0] (+ own[ids, 1] where it has two columns) (+ shift[0])."""
    constants = {"BIAS": own.shape[1] - 1, "SHIFT": shift is not None}
    launch(_gather_scaled, ids_B, out_BD, shared, own, own if shift is None else shift, len(shared), **constants)
