"""Truncated SVD, bucket means, rank one per bucket."""

# Shapes: N vectors, D dimensions, K buckets.

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.fits import made, weighted_relative_error
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting import (
    rank_one_per_bucket,
    weighted_bucket_means,
    weighted_kmeans,
    weighted_svd,
)


def weighted_error(vectors_ND: Tensor, approx_ND: Tensor, weights_N: Tensor) -> float:
    """The sum that every fit minimises."""
    return float((weights_N.double() * (vectors_ND.double() - approx_ND.double()).square().sum(1)).sum())


# ---- truncated SVD ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_svd_reconstructs_what_numpy_does(rank: int, offset: bool) -> None:
    """The best rank-R vectors are the truncated SVD of the rows times the root of their weight."""
    vectors_ND, w_N = torch.randn(60, 8, generator=made(1)) + 2, torch.rand(60, generator=made(2))
    w_N[5] = 0
    factors_NR, projection_RD, offset_D = weighted_svd(vectors_ND, rank, weights_N=w_N, offset=offset)
    x_ND, root_N1 = vectors_ND.double().numpy(), w_N.double().sqrt().numpy()[:, None]
    mean_D = np.average(x_ND, axis=0, weights=w_N.double().numpy()) if offset else np.zeros(8)
    u, s, v = np.linalg.svd((x_ND - mean_D) * root_N1, full_matrices=False)
    best_ND = (u[:, :rank] * s[:rank]) @ v[:rank]
    found_ND = (factors_NR @ projection_RD + offset_D).double().numpy()
    np.testing.assert_allclose((found_ND - mean_D) * root_N1, best_ND, atol=1e-5)
    np.testing.assert_allclose(offset_D.numpy(), mean_D, atol=1e-6)


def test_svd_of_full_rank_is_exact() -> None:
    """As many factors as dimensions lose nothing, for ids without weight too."""
    vectors_ND = torch.randn(30, 6, dtype=torch.float64)
    weights_N = (torch.arange(30) < 4).double()
    factors_NR, projection_RD, offset_D = weighted_svd(vectors_ND, 6, weights_N=weights_N)
    torch.testing.assert_close(factors_NR @ projection_RD + offset_D, vectors_ND, rtol=1e-9, atol=1e-9)


def test_svd_factors_are_well_conditioned() -> None:
    """Columns of the factors are uncorrelated and as large as the vectors' elements; rows of P are orthogonal."""
    vectors_ND = torch.randn(500, 10) * torch.logspace(0, -3, 10)
    factors_NR, projection_RD, _ = weighted_svd(vectors_ND, 4)
    size = (vectors_ND - vectors_ND.mean(0)).square().mean()
    torch.testing.assert_close(factors_NR.T @ factors_NR / 500, size * torch.eye(4), rtol=1e-3, atol=1e-4)
    product_RR = projection_RD @ projection_RD.T
    torch.testing.assert_close(product_RR, product_RR.diag().diag(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 5])
def test_svd_refuses_a_rank_that_cannot_be(rank: int) -> None:
    """The message of a refused rank holds the bounds and the rank."""
    with pytest.raises(ConfigError, match=rf"at most the 4 dimensions of the vectors, got {rank}"):
        weighted_svd(torch.randn(9, 4), rank)


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_chunks")
def test_bucket_means_are_weighted_means() -> None:
    """One bucket with weights, one whose weights are 0, one that is empty."""
    vectors_ND, w_N = torch.randn(40, 5), torch.rand(40)
    bucket_N = torch.arange(40) % 2
    w_N[bucket_N == 1] = 0
    means_MD = weighted_bucket_means(vectors_ND, bucket_N, 3, w_N)
    of_0 = (vectors_ND[::2] * w_N[::2, None]).sum(0) / w_N[::2].sum()
    torch.testing.assert_close(means_MD, torch.stack([of_0, vectors_ND[1::2].mean(0), of_0]))


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("bias", [False, True])
def test_rank_one_is_the_svd_of_each_bucket(bias: bool) -> None:
    """The error of every bucket is what torch.linalg.svd leaves of its weighted rows (less their means, with bias)."""
    num_buckets = 6
    vectors_ND = torch.randn(120, 7, dtype=torch.float64, generator=made(3))
    w_N = torch.rand(120, dtype=torch.float64, generator=made(4))
    bucket_N = torch.randint(num_buckets, (120,), generator=made(5))
    if bias:
        rows_MD, scale_N, bias_N = rank_one_per_bucket(
            vectors_ND, bucket_N, num_buckets, weights_N=w_N, bias=True, iterations=2000
        )
    else:
        rows_MD, scale_N = rank_one_per_bucket(vectors_ND, bucket_N, num_buckets, weights_N=w_N, iterations=2000)
        bias_N = torch.zeros(120, dtype=torch.float64)
    found_ND = scale_N[:, None] * rows_MD[bucket_N] + bias_N[:, None]
    for bucket in range(num_buckets):
        at = bucket_N == bucket
        x_nD = vectors_ND[at] - (vectors_ND[at].mean(1, keepdim=True) if bias else 0)
        left = torch.linalg.svdvals(x_nD * w_N[at, None].sqrt())[1:].square().sum()
        assert weighted_error(vectors_ND[at], found_ND[at], w_N[at]) == pytest.approx(float(left), rel=1e-6)
        mass_n = w_N[at] / w_N[at].sum()
        assert float((mass_n * scale_N[at].square()).sum()) == pytest.approx(1)
        assert float((mass_n * scale_N[at]).sum()) >= 0


def test_rank_one_of_odd_buckets() -> None:
    """One vector is reproduced, zeros give zeros, an empty bucket zeros, a bucket without weight its own fit."""
    vectors_ND = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])
    rows_MD, scale_N = rank_one_per_bucket(
        vectors_ND,
        torch.tensor([0, 1, 3, 3, 3]),
        4,
        weights_N=torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
    )
    torch.testing.assert_close(scale_N[:, None] * rows_MD[[0, 1, 3, 3, 3]], vectors_ND, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows_MD[0], torch.tensor([3.0, 4.0]))
    assert rows_MD[1:3].tolist() == [[0, 0], [0, 0]]
    assert scale_N[0] == scale_N[1] == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_vectors_stay_finite(scale: float) -> None:
    """Squares of very large or small float32 neither overflow nor vanish on the way."""
    vectors_ND = torch.randn(50, 4) * scale
    rows_MD, scale_N = rank_one_per_bucket(vectors_ND, torch.arange(50) % 3, 3)
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, 8, generator=made(0))
    for approx_ND in (scale_N[:, None] * rows_MD[torch.arange(50) % 3], centroids_KD[labels_N]):
        assert approx_ND.isfinite().all()
        assert weighted_relative_error(vectors_ND, approx_ND) < 0.9


@pytest.mark.parametrize(
    ("bucket", "says"),
    [
        (torch.zeros(8, dtype=torch.int64), r"int64 \[8\] for 9 vectors"),
        (torch.zeros(9), r"float32 \[9\]"),
        (torch.full((9,), 3), r"bucket 3 is outside \[0, 3\)"),
        (torch.full((9,), -1), r"bucket -1 is outside"),
    ],
)
def test_wrong_buckets_are_refused(bucket: Tensor, says: str) -> None:
    """DataError unless buckets are one int64 per vector, in range."""
    for fit in (rank_one_per_bucket, weighted_bucket_means):
        with pytest.raises(DataError, match=says):
            fit(torch.randn(9, 2), bucket, 3)
