"""Least squares for vectors that are sums of shared rows: `x_n ~ sum_k f_nk T[i_nk]`, for T and for the factors f."""

# Shapes: N vectors, K rows a vector is the sum of, R rows in all, D dimensions, S slots of factors.

from __future__ import annotations

import torch
from torch import Tensor

from embstore.errors import DataError
from embstore.fitting.checks import Progress, checked, chunks, working

LEAST_MASS = 1e-6
"""What a vector of weight 0 counts beside the mean weight: rows that only such vectors read are theirs."""


def best_rows(
    vectors_ND: Tensor,
    index_NK: Tensor,
    num_rows: int,
    *,
    weights_N: Tensor | None = None,
    factors_NK: Tensor | None = None,
    start_RD: Tensor | None = None,
    iterations: int = 60,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> Tensor:
    """The rows [R, D] that minimise `sum_n w_n |x_n - sum_k f_nk T[i_nk]|^2`; without factors all f are 1.

    Conjugate gradients on the normal equations, scaled by their diagonal, every column a system of its own: exact
    after one iteration where K is 1. Ends when an iteration lowers the error by less than `tolerance` of the vectors'
    own size. A row that no vector reads stays as it starts (0 unless given). About `4 N K D` operations an iteration.
    """
    mass_N = checked(vectors_ND, weights_N).clamp_min(LEAST_MASS)
    _check_index(index_NK, num_rows, len(vectors_ND))
    dtype = working(vectors_ND[:0]).dtype
    num_sums, dim = index_NK.shape[1], vectors_ND.shape[1]
    factors_NK = torch.ones(index_NK.shape, dtype=dtype, device=index_NK.device) if factors_NK is None else factors_NK
    parts = list(chunks(len(vectors_ND), num_sums * dim))

    def spread(vectors_nD: Tensor, at: slice, into_RD: Tensor) -> None:
        for k in range(num_sums):
            into_RD.index_add_(0, index_NK[at, k], vectors_nD * (mass_N[at] * factors_NK[at, k])[:, None].to(dtype))

    def normal(rows_RD: Tensor) -> Tensor:
        result_RD = torch.zeros_like(rows_RD)
        for at in parts:
            spread(compose(rows_RD, index_NK[at], factors_NK[at]), at, result_RD)
        return result_RD

    rows_RD = torch.zeros((num_rows, dim), dtype=dtype, device=vectors_ND.device)
    residual_RD, energy = torch.zeros_like(rows_RD), 0.0
    for at in parts:
        x_nD = working(vectors_ND[at])
        spread(x_nD, at, residual_RD)
        energy += float(mass_N[at] @ x_nD.double().square().sum(dim=1))
    diagonal_R = torch.zeros(num_rows, dtype=torch.float64, device=vectors_ND.device)
    for k in range(num_sums):
        diagonal_R.index_add_(0, index_NK[:, k], mass_N * factors_NK[:, k].double().square())
    inverse_R1 = torch.where(diagonal_R > 0, 1 / diagonal_R, 0.0)[:, None].to(dtype)
    noise_D = (8 * torch.finfo(dtype).eps) ** 2 * _dots(residual_RD, residual_RD * inverse_R1)
    if start_RD is not None:
        rows_RD = start_RD.to(dtype).clone()
        residual_RD -= normal(rows_RD)

    scaled_RD = residual_RD * inverse_R1
    direction_RD, along_D = scaled_RD, _dots(residual_RD, scaled_RD)
    for iteration in range(iterations):
        curved_RD = normal(direction_RD)
        curvature_D = _dots(direction_RD, curved_RD)
        step_D = torch.where((along_D > noise_D) & (curvature_D > 0), along_D / curvature_D, 0.0)
        rows_RD = rows_RD + direction_RD * step_D.to(dtype)
        residual_RD = residual_RD - curved_RD * step_D.to(dtype)
        if progress is not None:
            progress("least squares", iteration + 1, iterations)
        if float(step_D @ along_D) / 2 <= tolerance * energy:
            break
        scaled_RD = residual_RD * inverse_R1
        before_D, along_D = along_D, _dots(residual_RD, scaled_RD)
        turn_D = torch.where(before_D > 0, along_D / before_D, 0.0)
        direction_RD = scaled_RD + direction_RD * turn_D.to(dtype)
    return rows_RD


def best_factors(
    vectors_ND: Tensor,
    index_NK: Tensor,
    rows_RD: Tensor,
    slot_N: Tensor,
    num_slots: int,
    *,
    weights_N: Tensor | None = None,
) -> Tensor:
    """The factors [S, K] that minimise `sum_n w_n |x_n - sum_k f[s_n, k] T[i_nk]|^2`, exactly.

    Where a slot's vectors leave its factors open (rows alike, no vectors at all) they are those nearest to 1.
    """
    mass_N = checked(vectors_ND, weights_N).clamp_min(LEAST_MASS)
    num_sums = index_NK.shape[1]
    gram_SKK = torch.zeros((num_slots, num_sums, num_sums), dtype=torch.float64, device=vectors_ND.device)
    against_SK = torch.zeros((num_slots, num_sums), dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(len(vectors_ND), num_sums * vectors_ND.shape[1]):
        read_nKD = rows_RD[index_NK[at]].double()
        heavy_nKD = read_nKD * mass_N[at, None, None]
        gram_SKK.index_add_(0, slot_N[at], heavy_nKD @ read_nKD.transpose(1, 2))
        against_SK.index_add_(0, slot_N[at], (heavy_nKD @ vectors_ND[at].double()[:, :, None]).squeeze(2))
    trace_S = gram_SKK.diagonal(dim1=1, dim2=2).sum(dim=1)
    gram_SKK.diagonal(dim1=1, dim2=2).add_(torch.where(trace_S > 0, 1e-9 * trace_S, 1.0)[:, None])
    ones_SK = torch.ones_like(against_SK)
    open_SK = against_SK - (gram_SKK @ ones_SK[:, :, None]).squeeze(2)
    open_SK += torch.where(trace_S > 0, 1e-9 * trace_S, 1.0)[:, None]  # the ridge pulls towards 1, not towards 0
    further_SK: Tensor = torch.linalg.solve(gram_SKK, open_SK)
    return (ones_SK + further_SK).to(rows_RD.dtype)


def compose(rows_RD: Tensor, index_nK: Tensor, factors_nK: Tensor | None = None) -> Tensor:
    """`sum_k f_nk T[i_nk]`, [n, D]."""
    read_nKD = rows_RD[index_nK]
    if factors_nK is not None:
        read_nKD = read_nKD * factors_nK[:, :, None].to(rows_RD.dtype)
    return read_nKD.sum(dim=1)


def _dots(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """The columns' inner products, in float64."""
    return (a_RD.double() * b_RD.double()).sum(dim=0)


def _check_index(index_NK: Tensor, num_rows: int, num_vectors: int) -> None:
    if index_NK.ndim != 2 or len(index_NK) != num_vectors or index_NK.dtype != torch.int64:
        raise DataError(
            f"rows are int64 [{num_vectors:,}, K], one line a vector, got {index_NK.dtype} {list(index_NK.shape)}"
        )
    low, high = (int(bound) for bound in index_NK.aminmax())
    if low < 0 or high >= num_rows:
        raise DataError(f"row {low if low < 0 else high} is outside [0, {num_rows})")
