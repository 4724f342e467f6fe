"""Product quantisation in one launch: an id's codes name the parts of its vector, or what to rotate and add up."""

# Shapes: B ids of a program, C parts of a program, Z floats of a part, D columns of a program, K codes of a column.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.project import add_projected
from embstore.kernels.cuda.rows import (
    elements,
    launch,
    launch_chunks,
    program,
    put,
    row_width,
    scale_bias,
    tile_columns,
    tile_ids,
)


@triton.jit
def _parts(codebooks, row_BC, inside_Z, mask_BCZ, PART: tl.constexpr):
    """Float32 [B, C, Z]: rows of the codebooks side by side."""
    scale_BC, bias_BC = scale_bias(codebooks, row_BC, PART)
    if codebooks.dtype.element_ty == tl.uint8 or codebooks.dtype.element_ty == tl.int8:
        scale, bias = scale_BC[:, :, None], bias_BC[:, :, None]
        return elements(codebooks, row_BC[:, :, None], inside_Z[None, None, :], scale, bias, mask_BCZ, PART)
    else:
        return elements(codebooks, row_BC[:, :, None], inside_Z[None, None, :], 1.0, 0.0, mask_BCZ, PART)


@program
def _gather_codes(
    ids, num_ids: tl.int64, out, codebooks, codes,
    K: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr, BLOCK_Z: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    part_C = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_Z = tl.arange(0, BLOCK_Z)
    live_C = part_C < PARTS
    mask_BCZ = (found_B[:, None] & live_C[None, :])[:, :, None] & (inside_Z < PART)[None, None, :]
    vectors_BCZ = tl.zeros((BLOCK_B, BLOCK_D, BLOCK_Z), tl.float32)
    for stage in tl.static_range(STAGES):
        column_C = stage * PARTS + part_C
        place_BC = id_B[:, None] * (STAGES * PARTS) + column_C[None, :]
        code_BC = tl.load(codes + place_BC, mask=live_C[None, :], other=0).to(tl.int32)
        row_BC = tl.where(live_C, column_C * K, 0)[None, :] + code_BC
        parts_BCZ = _parts(codebooks, row_BC, inside_Z, mask_BCZ, PART)
        vectors_BCZ = parts_BCZ if stage == 0 else vectors_BCZ + parts_BCZ
    column_CZ = part_C[:, None] * PART + inside_Z[None, :]
    tl.store(out + at_B[:, None, None] * WIDTH + column_CZ[None, :, :], vectors_BCZ, mask=mask_BCZ)


def gather_codes(codebooks: Tensor, codes: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = the rows column * K + codes[ids, column] of the codebooks, side by side; further stages are added."""
    part, num_columns = row_width(codebooks), codes.shape[1]
    num_parts, block_z = out_BD.shape[1] // part, triton.next_power_of_2(part)
    sizes = {"K": len(codebooks) // num_columns, "PARTS": num_parts, "STAGES": num_columns // num_parts, "PART": part}
    launch_chunks(_gather_codes, ids_B, out_BD, (num_parts, block_z), codebooks, codes, BLOCK_Z=block_z, **sizes)


@program
def _gather_codes_rotated(
    ids, num_ids: tl.int64, out, codebooks, codes, rotation,
    K: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for c in range(COLUMNS):
        row_B = c * K + tl.load(codes + id_B * COLUMNS + c).to(tl.int32)
        zeros_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        rotated_BD = add_projected(
            zeros_BD, codebooks, row_B, found_B, rotation + c % PARTS * PART * WIDTH, column_D,
            PART, WIDTH, BLOCK_B, True,
        )  # fmt: skip
        vectors_BD = vectors_BD + rotated_BD
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_codes_rotated(
    codebooks: Tensor, codes: Tensor, num_parts: int, rotation: Tensor, ids_B: Tensor, out_BD: Tensor
) -> None:
    """out = what `gather_codes` gives, times the rotation; sums are taken as `cpu_pq` takes them."""
    num_columns = codes.shape[1]
    sizes = {"K": len(codebooks) // num_columns, "PARTS": num_parts, "COLUMNS": num_columns}
    launch(_gather_codes_rotated, ids_B, out_BD, codebooks, codes, rotation, PART=row_width(codebooks), **sizes)
