"""Complementary partitions in one launch: k rows of one stacked table are multiplied, added or laid side by side.

Which rows: see `cpu_qr`. The moduli are constants of the kernel: dividing by a constant is a multiplication.
"""

# Shapes: B ids of a program, D columns of a program, K partitions.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton.language as tl
from torch import Tensor

from embstore.kernels.cuda.rows import (
    columns_of_part,
    combine,
    launch,
    program,
    put,
    read_rows,
    row_width,
    tile_columns,
    tile_ids,
)


@program
def _combine(
    ids, num_ids: tl.int64, out, weight,
    MODULI: tl.constexpr, STARTS: tl.constexpr, K: tl.constexpr, CRT: tl.constexpr, OP: tl.constexpr,
    PART: tl.constexpr, WIDTH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at_B, id_B, found_B = tile_ids(ids, num_ids, BLOCK_B)
    column_D, mask_BD = tile_columns(found_B, WIDTH, BLOCK_D)
    rest_B = id_B
    vectors_BD = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for j in tl.static_range(K):
        index_B = rest_B
        if CRT:
            index_B = id_B % MODULI[j]
        elif j < K - 1:
            index_B = rest_B % MODULI[j]
            rest_B = rest_B // MODULI[j]
        part_D, part_BD = columns_of_part(column_D, mask_BD, j, OP, PART)
        row_BD = read_rows(weight, index_B + STARTS[j], part_D, part_BD, PART)
        vectors_BD = combine(vectors_BD, row_BD, part_BD, j == 0, OP)
    put(out, at_B, column_D, vectors_BD, mask_BD, WIDTH)


def gather_partitions(
    op: str, partition: str, weight: Tensor, moduli: Sequence[int], ids_B: Tensor, out_BD: Tensor
) -> None:
    """out = the rows of every id's partitions combined by `op`."""
    starts = (0, *accumulate(moduli))[:-1]
    sizes = {"MODULI": tuple(moduli), "STARTS": starts, "K": len(moduli), "PART": row_width(weight)}
    launch(_combine, ids_B, out_BD, weight, **sizes, CRT=partition == "crt", OP=op)
