"""Every operation in plain torch: short enough to be obviously right, on any device.

The compose functions are what a scheme's `forward` calls too, so training and serving share one definition.
"""

# Shapes: B ids, D embedding_dim, R/M/Q rows of tables; see the package docstring.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from embstore.hashing import bucket_torch


def _write(out_BD: Tensor, ids_B: Tensor, compose: Callable[[Tensor], Tensor]) -> None:
    found_B = ids_B >= 0
    if bool(found_B.all()):
        out_BD.copy_(compose(ids_B))
    else:
        out_BD[found_B] = compose(ids_B[found_B])


def quotient(ids_B: Tensor, num_remainders: int) -> Tensor:
    """Integer division in int64: a float division is wrong past 2**24."""
    return torch.div(ids_B, num_remainders, rounding_mode="floor")


def gather(weight_RD: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[ids]."""
    _write(out_BD, ids_B, lambda ids: weight_RD[ids])


def gather_mod(weight_MD: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = weight[ids mod M]."""
    _write(out_BD, ids_B, lambda ids: weight_MD[ids % len(weight_MD)])


def gather_hash(weight_MD: Tensor, ids_B: Tensor, seed: int, out_BD: Tensor) -> None:
    """out = weight[bucket(ids, M, seed)]."""
    _write(out_BD, ids_B, lambda ids: weight_MD[bucket_torch(ids, len(weight_MD), seed)])


def gather_pair_mul(quotient_QD: Tensor, remainder_RD: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = quotient[ids // R] * remainder[ids mod R]."""
    r = len(remainder_RD)
    _write(out_BD, ids_B, lambda ids: quotient_QD[quotient(ids, r)] * remainder_RD[ids % r])


def gather_pair_add(quotient_QD: Tensor, remainder_RD: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = quotient[ids // R] + remainder[ids mod R]."""
    r = len(remainder_RD)
    _write(out_BD, ids_B, lambda ids: quotient_QD[quotient(ids, r)] + remainder_RD[ids % r])


def gather_pair_concat(quotient_QE: Tensor, remainder_RF: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = [quotient[ids // R], remainder[ids mod R]]."""
    r = len(remainder_RF)
    _write(out_BD, ids_B, lambda ids: torch.cat([quotient_QE[quotient(ids, r)], remainder_RF[ids % r]], dim=-1))


def gather_scaled(shared_MD: Tensor, scale_N1: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = shared[ids mod M] * scale[ids, 0]."""
    _write(out_BD, ids_B, lambda ids: shared_MD[ids % len(shared_MD)] * scale_N1[ids])


def gather_scaled_biased(shared_MD: Tensor, scale_bias_N2: Tensor, ids_B: Tensor, out_BD: Tensor) -> None:
    """out = shared[ids mod M] * scale_bias[ids, 0] + scale_bias[ids, 1]."""

    def compose(ids: Tensor) -> Tensor:
        pair_B2 = scale_bias_N2[ids]
        return shared_MD[ids % len(shared_MD)] * pair_B2[:, :1] + pair_B2[:, 1:]

    _write(out_BD, ids_B, compose)
