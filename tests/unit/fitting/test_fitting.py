"""The numerics of fitting, against brute force: what is minimised, and what happens at the edges."""

# Shapes: N vectors, D dimensions, K clusters, M buckets, R rank.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import weighted_relative_error
from torch import Tensor, nn

from embstore.errors import ConfigError, DataError
from embstore.fitting import checks as fitting_checks
from embstore.fitting import (
    distill,
    nearest_centroids,
    rank_one_per_bucket,
    weighted_bucket_means,
    weighted_kmeans,
    weighted_svd,
)


def made(seed: int) -> torch.Generator:
    """A generator in a known state."""
    return torch.Generator().manual_seed(seed)


def clustered(num_vectors: int, dim: int, num_clusters: int, *, spread: float = 0.05, seed: int = 0) -> Any:
    """Vectors around planted centres, the centres, and each vector's cluster."""
    generator = made(seed)
    centres_KD = torch.randn(num_clusters, dim, generator=generator)
    labels_N = torch.arange(num_vectors) % num_clusters
    noise_ND = torch.randn(num_vectors, dim, generator=generator)
    return centres_KD[labels_N] + spread * noise_ND, centres_KD, labels_N


def weighted_error(vectors_ND: Tensor, approx_ND: Tensor, weights_N: Tensor) -> float:
    """The sum that every fit minimises."""
    return float((weights_N.double() * (vectors_ND.double() - approx_ND.double()).square().sum(1)).sum())


@pytest.fixture(params=["one chunk", "small chunks"])
def any_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors read at once, and a few rows at a time."""
    if request.param == "small chunks":
        monkeypatch.setattr(fitting_checks, "CHUNK_ELEMENTS", 100)


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
    """The message holds the bounds and the rank."""
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
    """One int64 per vector, in range."""
    for fit in (rank_one_per_bucket, weighted_bucket_means):
        with pytest.raises(DataError, match=says):
            fit(torch.randn(9, 2), bucket, 3)


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("any_chunks")
@pytest.mark.parametrize("num_vectors", [200, 3000])
def test_kmeans_recovers_planted_clusters(num_vectors: int) -> None:
    """Every planted cluster becomes one cluster with its weighted mean, with all vectors or with a sample of them."""
    vectors_ND, _, planted_N = clustered(num_vectors, 6, 10)
    w_N = torch.rand(num_vectors, generator=made(1)) + 0.1
    centroids_KD, labels_N = weighted_kmeans(
        vectors_ND, 10, weights_N=w_N, generator=made(2), max_points_per_cluster=100
    )
    pairs = set(zip(planted_N.tolist(), labels_N.tolist(), strict=True))
    assert len(pairs) == 10
    assert len({label for _, label in pairs}) == 10
    for planted, label in pairs:
        at = planted_N == planted
        mean_D = (vectors_ND[at] * w_N[at, None]).sum(0) / w_N[at].sum()
        torch.testing.assert_close(centroids_KD[label], mean_D, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_clusters", [5, 6, 9])
def test_kmeans_with_a_cluster_per_vector_is_exact(num_clusters: int) -> None:
    """Bit for bit, whether there are as many clusters as vectors or more."""
    vectors_ND = torch.randn(5, 3)
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, num_clusters)
    assert centroids_KD.shape == (num_clusters, 3)
    assert torch.equal(centroids_KD[labels_N], vectors_ND)
    assert centroids_KD.isfinite().all()


@settings(max_examples=30)
@given(distinct=st.integers(1, 12), copies=st.integers(2, 9), extra=st.integers(0, 5), offset=st.sampled_from([0, 100]))
def test_kmeans_finds_all_distinct_vectors(distinct: int, copies: int, extra: int, offset: int) -> None:
    """With at least as many clusters as distinct vectors each is reproduced, however often it is repeated."""
    values_KD = torch.randn(distinct, 4, generator=made(distinct)) + offset
    vectors_ND = values_KD.repeat(copies, 1)
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, distinct + extra, generator=made(copies))
    assert torch.equal(centroids_KD[labels_N], vectors_ND)
    assert centroids_KD.isfinite().all()


def test_kmeans_ignores_what_weighs_nothing() -> None:
    """Vectors of weight 0 pull no centroid, but get a label."""
    vectors_ND = torch.tensor([[0.0], [1.0], [10.0], [11.0], [50.0], [51.0]])
    w_N = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, 2, weights_N=w_N, generator=made(0))
    assert sorted(centroids_KD.flatten().tolist()) == [0.25, 10.5]
    assert len(set(labels_N[2:].tolist())) == 1


def test_labels_are_the_nearest_centroids() -> None:
    """The labels that come back belong to the centroids that come back."""
    vectors_ND = torch.randn(700, 5, generator=made(0))
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, 20, generator=made(1), max_points_per_cluster=10)
    squares_NK = torch.cdist(vectors_ND.double(), centroids_KD.double()).square()
    assert torch.equal(labels_N, squares_NK.argmin(1))
    found_N, nearest_N = nearest_centroids(vectors_ND, centroids_KD)
    assert torch.equal(found_N, labels_N)
    torch.testing.assert_close(nearest_N.double(), squares_NK.min(1).values, rtol=1e-4, atol=1e-5)


def test_kmeans_error_falls_with_clusters_and_iterations() -> None:
    """More clusters, or more iterations from the same seeds, never leave a larger error here."""
    vectors_ND, w_N = torch.randn(600, 8, generator=made(0)), torch.rand(600, generator=made(1)) ** 4

    def error(num_clusters: int, iterations: int) -> float:
        centroids_KD, labels_N = weighted_kmeans(
            vectors_ND, num_clusters, weights_N=w_N, iterations=iterations, generator=made(2)
        )
        return weighted_relative_error(vectors_ND, centroids_KD[labels_N], w_N)

    by_clusters = [error(k, 10) for k in (1, 4, 16, 64, 256)]
    by_iterations = [error(16, i) for i in (0, 1, 3, 10, 30)]
    assert by_clusters == sorted(by_clusters, reverse=True)
    assert by_iterations == sorted(by_iterations, reverse=True)


def test_kmeans_of_many_clusters_fills_them_all() -> None:
    """Past the limit of k-means++ too, no cluster stays empty while some vector is not its own centroid."""
    vectors_ND, _, _ = clustered(3000, 4, 40, spread=0.3)
    centroids_KD, labels_N = weighted_kmeans(vectors_ND, 600, generator=made(0), max_points_per_cluster=3)
    assert len(centroids_KD) == 600
    assert len(labels_N.unique()) > 590


def test_kmeans_repeats_itself() -> None:
    """The same generator state gives the same clusters; the vectors are not touched; progress is told."""
    vectors_ND = torch.randn(500, 4)
    before, told = vectors_ND.clone(), list[tuple[str, int, int]]()
    runs = [
        weighted_kmeans(vectors_ND, 12, generator=made(7), max_points_per_cluster=20, progress=tell)
        for tell in (lambda *fact: told.append(fact), None)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(vectors_ND, before)
    assert told[0] == ("k-means", 1, 25)


# ---- distillation ----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A hashing trick with a network behind it: parameters of every kind, a buffer, sparse gradients on request."""

    def __init__(self, num_rows: int, dim: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.sparse = sparse
        self.weight = nn.Parameter(torch.randn(num_rows, dim) * 0.1)
        self.last = nn.Linear(dim, dim)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by id mod M, through a layer."""
        if self.training:
            self.seen += 1
        rows = nn.functional.embedding(ids % len(self.weight), self.weight, sparse=self.sparse)
        found: Tensor = self.last(rows)
        return found


@pytest.mark.parametrize("sparse", [False, True])
def test_distilling_comes_close_to_the_best_there_is(sparse: bool) -> None:
    """Shared rows end at the weighted means of their ids, the module as it was otherwise."""
    vectors_ND = torch.randn(60, 4, generator=made(0)) * 3
    w_N = torch.rand(60, generator=made(1)) ** 3
    bucket_N = torch.arange(60) % 20
    best = weighted_relative_error(vectors_ND, weighted_bucket_means(vectors_ND, bucket_N, 20, w_N)[bucket_N], w_N)
    module = Shared(20, 4, sparse=sparse).eval()
    told = list[tuple[str, int, int]]()
    error = distill(
        module,
        vectors_ND,
        weights_N=w_N,
        steps=600,
        batch_size=256,
        generator=made(2),
        progress=lambda *fact: told.append(fact),
    )
    assert error == pytest.approx(weighted_relative_error(vectors_ND, module(torch.arange(60)).detach(), w_N))
    assert best <= error < best * 1.02
    assert (module.sparse, module.training) == (sparse, False)
    assert all(p.grad is None for p in module.parameters())
    assert told[-1] == ("distilling", 600, 600)


@settings(max_examples=8)
@given(learning_rate=st.sampled_from([1e-4, 0.03, 5.0, 1e6]))
def test_distilling_never_ends_worse(learning_rate: float) -> None:
    """Even with a learning rate that throws everything away, the state kept is the best that was seen."""
    vectors_ND = torch.randn(50, 4)
    module = Shared(10, 4)
    before = weighted_relative_error(vectors_ND, module(torch.arange(50)).detach())
    error = distill(module, vectors_ND, steps=8, batch_size=32, learning_rate=learning_rate)
    assert error <= before
    assert error == pytest.approx(weighted_relative_error(vectors_ND, module(torch.arange(50)).detach()))


def test_distilling_repeats_itself() -> None:
    """The same generator state and module give the same parameters."""
    vectors_ND, runs = torch.randn(40, 3), []
    for _ in range(2):
        torch.manual_seed(0)
        module = Shared(7, 3)
        distill(module, vectors_ND, steps=20, batch_size=16, generator=made(3))
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("batch_size", -1), ("learning_rate", float("nan"))])
def test_distilling_refuses_impossible_settings(name: str, value: Any) -> None:
    """The message names the setting and the value."""
    with pytest.raises(ConfigError, match=f"{name} must be above 0, got {value}"):
        distill(Shared(3, 2), torch.randn(9, 2), **{name: value})


def test_distilling_refuses_what_cannot_learn() -> None:
    """A module without parameters, or one that gives vectors of another width."""
    with pytest.raises(ConfigError, match="no parameters to train"):
        distill(nn.Identity(), torch.randn(9, 2))
    with pytest.raises(DataError, match=r"module gives vectors \[\d+, 3\], these are \[\d+, 2\]"):
        distill(Shared(3, 3), torch.randn(9, 2), steps=1)


# ---- what every one of them refuses ----------------------------------------------------------------------------------

FITS: dict[str, Callable[[Tensor, Tensor | None], object]] = {
    "kmeans": lambda x, w: weighted_kmeans(x, 2, weights_N=w),
    "svd": lambda x, w: weighted_svd(x, 1, weights_N=w),
    "rank one": lambda x, w: rank_one_per_bucket(x, torch.zeros(len(x), dtype=torch.int64), 1, weights_N=w),
    "means": lambda x, w: weighted_bucket_means(x, torch.zeros(len(x), dtype=torch.int64), 1, w),
    "distill": lambda x, w: distill(Shared(2, 3), x, weights_N=w, steps=1),
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.usefixtures("any_chunks")
def test_vectors_that_are_not_finite_are_refused(fit: str, bad: float) -> None:
    """The first such row is named."""
    vectors_ND = torch.randn(200, 3)
    vectors_ND[[123, 150], 1] = bad
    with pytest.raises(DataError, match="NaN or infinity, first in row 123"):
        FITS[fit](vectors_ND, None)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (torch.ones(19), r"weights have shape \[19\], there are 20 vectors"),
        (torch.ones(20, 1), r"weights have shape \[20, 1\]"),
        (torch.full((20,), -2.5), r"at least 0, got -2.5 in row 0"),
        (torch.full((20,), float("nan")), r"finite and at least 0, got nan in row 0"),
        (torch.zeros(20), r"all 20 weights are 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(fit: str, weights: Tensor, says: str) -> None:
    """Length, sign, NaN, nothing but zeros: each with its numbers."""
    with pytest.raises(DataError, match=says):
        FITS[fit](torch.randn(20, 3), weights)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("vectors", "says"),
    [(torch.randn(5), r"got \[5\]"), (torch.randn(0, 3), r"got \[0, 3\]"), (torch.ones(5, 3).long(), "torch.int64")],
)
def test_what_is_no_table_is_refused(fit: str, vectors: Tensor, says: str) -> None:
    """Vectors are floats of shape [N, D]."""
    with pytest.raises(DataError, match=says):
        FITS[fit](vectors, None)


@pytest.mark.parametrize("fit", FITS)
def test_weights_count_only_relative_to_each_other(fit: str) -> None:
    """Counts up to the largest floats do as well as shares of 1, in half precision too."""
    vectors_ND = torch.randn(20, 3).half()
    FITS[fit](vectors_ND, torch.full((20,), 1e308, dtype=torch.float64))
    FITS[fit](vectors_ND, torch.arange(20))
