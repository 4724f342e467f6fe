"""Path-based composition in two launches: a hidden layer over a shared row, then the output layer over that.

Every id reads the layers of its own bucket. The network of a bucket is a few kilobytes, ids are numbered by falling
frequency and a bucket is a range of quotients: what most ids of a batch read is in the cache after the first.
"""

# Shapes: B ids of a program, D columns of a program, Q buckets, W floats of a row, H hidden units.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.rows import (
    elements,
    launch,
    mod,
    program,
    put,
    row_width,
    scale_bias,
    tile_columns,
    tile_ids,
)


@program
def _layer(
    ids, num_ids: tl.int64, out, inputs, layers, biases, num_rows: tl.int64,
    DEPTH: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    q_B = (id_B.to(tl.uint64) // num_rows.to(tl.uint64)).to(tl.int64)
    row_B = mod(id_B, num_rows) if HIDDEN else at_B
    scale_B, bias_B = scale_bias(inputs, row_B, DEPTH)
    vectors_BD = tl.load(biases + q_B[:, None] * WIDTH + column_D[None, :], mask=mask_BD, other=0.0)
    for k in range(DEPTH):
        factor_B = elements(inputs, row_B, k + tl.zeros((BLOCK_B,), tl.int32), scale_B, bias_B, found_B, DEPTH)
        place_BD = (q_B[:, None] * DEPTH + k) * WIDTH + column_D[None, :]
        vectors_BD = vectors_BD + factor_B[:, None] * tl.load(layers + place_BD, mask=mask_BD, other=0.0)
    if HIDDEN:
        vectors_BD = tl.maximum(vectors_BD, 0.0)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_through(
    weight: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor, output_bias: Tensor,
    ids_B: Tensor, out_BD: Tensor,
) -> None:  # fmt: skip
    """out = relu(weight[ids mod M] @ hidden[q] + hidden_bias[q]) @ output[q] + output_bias[q], q = ids // M."""
    z_BH = torch.empty(len(ids_B), hidden.shape[2], dtype=torch.float32, device=out_BD.device)
    launch(_layer, ids_B, z_BH, weight, hidden, hidden_bias, len(weight), DEPTH=row_width(weight), HIDDEN=True)
    launch(_layer, ids_B, out_BD, z_BH, output, output_bias, len(weight), DEPTH=z_BH.shape[1], HIDDEN=False)
