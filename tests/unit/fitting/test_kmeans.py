"""Weighted k-means."""

# Shapes: N vectors, K clusters, D dimensions.

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fits import made, weighted_relative_error

from embstore.fitting import (
    nearest_centroids,
    weighted_kmeans,
)


def clustered(num_vectors: int, dim: int, num_clusters: int, *, spread: float = 0.05, seed: int = 0) -> Any:
    """Vectors around planted centres, the centres, and each vector's cluster."""
    generator = made(seed)
    centres_KD = torch.randn(num_clusters, dim, generator=generator)
    labels_N = torch.arange(num_vectors) % num_clusters
    noise_ND = torch.randn(num_vectors, dim, generator=generator)
    return centres_KD[labels_N] + spread * noise_ND, centres_KD, labels_N


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
