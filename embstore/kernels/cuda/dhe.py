"""What stands around the matrix products of networks: the encoding of ids before them, the writing of vectors after.

The products are torch's, so a lookup by a network is these two launches and those of the layers between.
"""

# Shapes: B ids of a program, K hashes, D columns of a program.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.rows import launch, mix, program, put, tile_columns, tile_ids

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def _uniform(id_B, offsets, hash_K, WIDTH: tl.constexpr):
    """The high 24 bits u of a hash as (2 u + 1 - 2^24) / 2^24: exact, and symmetric about 0."""
    offset_K = tl.load(offsets + hash_K, mask=hash_K < WIDTH, other=0)
    high_BK = (mix(id_B[:, None], offset_K[None, :]) >> 40).to(tl.int32)
    return (2 * high_BK - ((1 << 24) - 1)).to(tl.float32) * (2.0**-24)


@program
def _encode(
    ids, num_ids: tl.int64, out, offsets,
    GAUSSIAN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    hash_K, mask_BK = tile_columns(found_B, WIDTH, BLOCK_D)
    if GAUSSIAN:
        first_BK = (_uniform(id_B, offsets, hash_K - hash_K % 2, WIDTH) + 1) * 0.5
        angle_BK = TURN * ((_uniform(id_B, offsets, hash_K - hash_K % 2 + 1, WIDTH) + 1) * 0.5)
        wave_BK = tl.where((hash_K % 2 == 0)[None, :], tl.cos(angle_BK), tl.sin(angle_BK))
        put(out, at_B, hash_K, tl.sqrt(-2 * tl.log(first_BK)) * wave_BK, mask_BK, WIDTH)
    else:
        put(out, at_B, hash_K, _uniform(id_B, offsets, hash_K, WIDTH), mask_BK, WIDTH)


def encode(ids_B: Tensor, offsets_K: Tensor, *, gaussian: bool) -> Tensor:
    """Float32 [B, K]: the numbers that ids are known by; rows of negative ids hold anything."""
    encoded_BK = torch.empty(len(ids_B), len(offsets_K), dtype=torch.float32, device=ids_B.device)
    launch(_encode, ids_B, encoded_BK, offsets_K, GAUSSIAN=gaussian)
    return encoded_BK


@program
def _put_found(ids, num_ids: tl.int64, out, vectors, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    at_B, _, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    vectors_BD = tl.load(vectors + at_B[:, None] * WIDTH + column_D[None, :], mask=mask_BD, other=0.0)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def put_found(vectors_BD: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = vectors (contiguous), except in the rows of negative ids."""
    launch(_put_found, ids_B, out_BD, vectors_BD)
