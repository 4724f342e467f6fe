"""Fits with a closed form, or nearly: truncated SVD, bucket means, the best rank one of every bucket."""

# Shapes: N vectors, D dimensions, R rank, M buckets.

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting.checks import checked, chunks, largest, weighted_mean, working


def weighted_svd(
    vectors_ND: Tensor, rank: int, *, weights_N: Tensor | None = None, offset: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors A [N, R], projection P [R, D] and offset o [D] that minimise `sum w |x - (A P + o)|^2`, exactly.

    o is the weighted mean (0 without `offset`), P spans the leading eigenvectors of the weighted covariance. The rows
    of P are orthogonal; their lengths are such that every column of A has the same weighted mean square, that of the
    vectors' elements. So the columns can share one row's quantisation scale and one learning rate.
    """
    mass_N = checked(vectors_ND, weights_N)
    dim = vectors_ND.shape[1]
    if not 1 <= rank <= dim:
        raise ConfigError(f"rank must be at least 1 and at most the {dim} dimensions of the vectors, got {rank}")
    offset_D = weighted_mean(vectors_ND, mass_N)
    if not offset:
        offset_D = torch.zeros_like(offset_D)
    covariance_DD = torch.zeros((dim, dim), dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(*vectors_ND.shape):
        centred_nD = vectors_ND[at].double() - offset_D
        covariance_DD += (centred_nD * mass_N[at, None]).T @ centred_nD
    values_D, basis_DD = torch.linalg.eigh(covariance_DD / mass_N.sum())
    basis_RD = basis_DD.T.flip(0)[:rank]
    deviation_R = values_D.flip(0)[:rank].clamp_min(0).sqrt()
    scale = float((values_D.clamp_min(0).sum() / dim).sqrt()) or 1.0
    # Directions in which the vectors do not vary keep a length above 0: ids of weight 0 may still vary there.
    length_R = deviation_R.clamp_min(1e-3 * float(deviation_R[0]) or scale) / scale
    factors_NR = torch.empty((len(vectors_ND), rank), dtype=working(vectors_ND[:0]).dtype, device=vectors_ND.device)
    for at in chunks(*vectors_ND.shape):
        factors_NR[at] = ((vectors_ND[at].double() - offset_D) @ basis_RD.T / length_R).to(factors_NR.dtype)
    projection_RD = (basis_RD * length_R[:, None]).to(factors_NR.dtype)
    return factors_NR, projection_RD, offset_D.to(factors_NR.dtype)


def weighted_bucket_means(
    vectors_ND: Tensor, bucket_N: Tensor, num_buckets: int, weights_N: Tensor | None = None
) -> Tensor:
    """The weighted mean of every bucket's vectors, [M, D]: the row that minimises the bucket's weighted error.

    A bucket whose weights are all 0 gets its plain mean, an empty one the weighted mean of all vectors.
    """
    mass_N = checked(vectors_ND, weights_N)
    _check_buckets(bucket_N, num_buckets, len(vectors_ND))
    inner_N = _within_buckets(mass_N, bucket_N, num_buckets)
    sums_MD, total_M = bucket_sums(vectors_ND, bucket_N, num_buckets, inner_N)
    means_MD = sums_MD / total_M.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    means_MD = torch.where(total_M[:, None] > 0, means_MD, weighted_mean(vectors_ND, mass_N))
    return means_MD.to(working(vectors_ND[:0]).dtype)


@overload
def rank_one_per_bucket(
    vectors_ND: Tensor,
    bucket_N: Tensor,
    num_buckets: int,
    *,
    weights_N: Tensor | None = None,
    bias: Literal[False] = False,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]: ...
@overload
def rank_one_per_bucket(
    vectors_ND: Tensor,
    bucket_N: Tensor,
    num_buckets: int,
    *,
    weights_N: Tensor | None = None,
    bias: Literal[True],
    iterations: int = 100,
) -> tuple[Tensor, Tensor, Tensor]: ...
def rank_one_per_bucket(
    vectors_ND: Tensor,
    bucket_N: Tensor,
    num_buckets: int,
    *,
    weights_N: Tensor | None = None,
    bias: bool = False,
    iterations: int = 100,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """A row per bucket [M, D] and a scale per id [N] that minimise `sum w |x - scale row|^2`.

    The row is the leading right singular vector of the bucket's weighted vectors, found by power iteration over all
    buckets at once. Its sign makes the weighted sum of the scales positive and its length makes their weighted mean
    square 1. A bucket whose weights are all 0 is fitted without them; one without vectors, or with none but zeros,
    gets a row of zeros (and scales of 1).

    bias: also a bias per id [N], added to every column: `sum w |x - (scale row + bias 1)|^2`. It takes all that lies
    along the vector of ones, so the best rows are those of the vectors less the mean of their own elements, and the
    bias is that mean: exact, nothing is alternated.
    """
    mass_N = checked(vectors_ND, weights_N)
    _check_buckets(bucket_N, num_buckets, len(vectors_ND))
    rows_MD, scale_N = _rank_one(vectors_ND, bucket_N, num_buckets, mass_N, iterations, centred=bias)
    if not bias:
        return rows_MD, scale_N
    bias_N = torch.empty_like(scale_N)
    for at in chunks(*vectors_ND.shape):
        bias_N[at] = vectors_ND[at].double().mean(dim=1).to(bias_N.dtype)
    return rows_MD, scale_N, bias_N


def bucket_sums(vectors_ND: Tensor, bucket_N: Tensor, num_buckets: int, mass_N: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of every bucket's vectors [M, D] and its total weight [M], in float64."""
    sums_MD = torch.zeros((num_buckets, vectors_ND.shape[1]), dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(*vectors_ND.shape):
        sums_MD.index_add_(0, bucket_N[at], vectors_ND[at].double() * mass_N[at, None])
    return sums_MD, _bucket_total(mass_N, bucket_N, num_buckets)


def _rank_one(
    vectors_ND: Tensor, bucket_N: Tensor, num_buckets: int, mass_N: Tensor, iterations: int, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """The power iteration; `centred`: of the vectors less the mean of their own elements."""
    dtype = working(vectors_ND[:0]).dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7
    inner_N = _within_buckets(mass_N, bucket_N, num_buckets).to(dtype)
    unit = largest(vectors_ND) or 1.0

    def chunk(at: slice) -> Tensor:
        x_nD = working(vectors_ND[at]) / unit  # so that squares stay finite
        return x_nD - x_nD.mean(dim=1, keepdim=True) if centred else x_nD

    def along(rows: Tensor) -> tuple[Tensor, Tensor]:
        """For directions [M, D] (or one, [D]): each vector's length along its own, and sum w length x by bucket."""
        length_N = torch.empty(len(vectors_ND), dtype=dtype, device=vectors_ND.device)
        sums_MD = torch.zeros((num_buckets, vectors_ND.shape[1]), dtype=dtype, device=vectors_ND.device)
        for at in chunks(*vectors_ND.shape):
            x_nD = chunk(at)
            length_N[at] = (x_nD * rows[bucket_N[at]]).sum(dim=1) if rows.ndim == 2 else x_nD @ rows
            sums_MD.index_add_(0, bucket_N[at], x_nD * (inner_N[at] * length_N[at])[:, None])
        return length_N, sums_MD

    # A fixed random direction to start from: one of the data's own may be orthogonal to the answer.
    start = torch.Generator().manual_seed(0)
    probe_D = torch.randn(vectors_ND.shape[1], dtype=torch.float64, generator=start).to(vectors_ND.device, dtype)
    _, sums_MD = along(probe_D)
    directions_MD, captured = _unit(sums_MD), 0.0
    for _ in range(iterations):
        length_N, sums_MD = along(directions_MD)
        before, captured = captured, float((inner_N * length_N.square()).sum(dtype=torch.float64))
        directions_MD = _unit(sums_MD)
        if captured <= before * (1 + tolerance):
            break
    length_N, _ = along(directions_MD)

    square_M = _bucket_total(inner_N * length_N.square(), bucket_N, num_buckets)
    weight_M = _bucket_total(inner_N, bucket_N, num_buckets)
    size_M = (square_M / weight_M.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    sign_M = torch.where(_bucket_total(inner_N * length_N, bucket_N, num_buckets) < 0, -1.0, 1.0)
    factor_M = (sign_M * size_M).to(dtype)
    nothing_N = (factor_M == 0)[bucket_N]
    scale_N = torch.where(nothing_N, 1.0, length_N / torch.where(nothing_N, 1.0, factor_M[bucket_N]))
    return directions_MD * (factor_M * unit)[:, None], scale_N


def _unit(rows_MD: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    largest_M1 = rows_MD.abs().amax(dim=1, keepdim=True)  # first, so that squares neither overflow nor vanish
    rows_MD = rows_MD / torch.where(largest_M1 > 0, largest_M1, 1.0)
    return rows_MD / rows_MD.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1.0)


def _bucket_total(values_N: Tensor, bucket_N: Tensor, num_buckets: int) -> Tensor:
    totals_M = torch.zeros(num_buckets, dtype=torch.float64, device=values_N.device)
    totals_M.index_add_(0, bucket_N, values_N.double())
    return totals_M


def _within_buckets(mass_N: Tensor, bucket_N: Tensor, num_buckets: int) -> Tensor:
    """The weights, with ones where a whole bucket has none: every row is as good there, a mean is the best guess."""
    total_M = _bucket_total(mass_N, bucket_N, num_buckets)
    return torch.where(total_M[bucket_N] > 0, mass_N, 1.0)


def _check_buckets(bucket_N: Tensor, num_buckets: int, num_vectors: int) -> None:
    if bucket_N.shape != (num_vectors,) or bucket_N.dtype != torch.int64:
        raise DataError(
            f"buckets are one int64 per vector, got {bucket_N.dtype} {list(bucket_N.shape)} for {num_vectors:,} vectors"
        )
    low, high = (int(bound) for bound in bucket_N.aminmax())
    if low < 0 or high >= num_buckets:
        raise DataError(f"bucket {low if low < 0 else high} is outside [0, {num_buckets})")
