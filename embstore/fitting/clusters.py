"""Weighted k-means for many clusters: coarse groups first, then clusters within each, then the whole once more.

One level costs `N K D` an iteration, which a million vectors in a hundred thousand clusters cannot afford; two levels
of sqrt K each cost `N sqrt(K) D`.
"""

# Shapes: N vectors, K clusters, G groups, D dimensions.

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from embstore.fitting.checks import Progress, checked, chunks
from embstore.fitting.kmeans import nearest_centroids, weighted_kmeans
from embstore.fitting.linear import weighted_bucket_means

ITERATIONS = 25
AFFORDABLE = 2e12
"""Multiplications that one level may take: some ten seconds on a few cores."""


def many_clusters(
    vectors_ND: Tensor,
    num_clusters: int,
    *,
    weights_N: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    affordable: float = AFFORDABLE,
) -> tuple[Tensor, Tensor]:
    """`weighted_kmeans`, in two levels where one would take more than `affordable` multiplications.

    Groups get clusters in proportion to their weighted squared error, at least one and no more than they have vectors.
    Where a pass over all pairs is affordable, vectors move to the nearest centroid of any group in the end.
    """
    num_vectors, dim = vectors_ND.shape
    one_pass = float(num_vectors) * num_clusters * dim
    if one_pass * ITERATIONS <= affordable or num_clusters >= num_vectors or num_clusters < 4:
        return weighted_kmeans(
            vectors_ND,
            num_clusters,
            weights_N=weights_N,
            iterations=ITERATIONS,
            generator=generator,
            progress=progress,
        )
    mass_N = checked(vectors_ND, weights_N)
    num_groups = isqrt(num_clusters)
    centres_GD, group_N = weighted_kmeans(
        vectors_ND, num_groups, weights_N=weights_N, iterations=ITERATIONS, generator=generator
    )
    error_G = torch.zeros(num_groups, dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(num_vectors, dim):
        squares_n = (vectors_ND[at].double() - centres_GD[group_N[at]]).square().sum(dim=1)
        error_G.index_add_(0, group_N[at], squares_n * mass_N[at])
    size_G = torch.bincount(group_N, minlength=num_groups)
    share_G = share_out(error_G, size_G, num_clusters).tolist()
    labels_N, first = torch.empty_like(group_N), 0
    order_N, ends_G = group_N.argsort(stable=True), size_G.cumsum(dim=0).tolist()
    for group, (start, end) in enumerate(zip([0, *ends_G], ends_G, strict=False)):
        ids_n = order_N[start:end]
        if share_G[group]:
            mass_n = mass_N[ids_n] if mass_N[ids_n].any() else None
            _, inner_n = weighted_kmeans(
                vectors_ND[ids_n], share_G[group], weights_N=mass_n, iterations=ITERATIONS, generator=generator
            )
            labels_N[ids_n] = first + inner_n
            first += share_G[group]
        if progress is not None:
            progress("k-means in groups", group + 1, num_groups)
    centroids_KD = weighted_bucket_means(vectors_ND, labels_N, num_clusters, mass_N)
    if one_pass <= affordable:
        labels_N, _ = nearest_centroids(vectors_ND, centroids_KD)
        centroids_KD = weighted_bucket_means(vectors_ND, labels_N, num_clusters, mass_N)
    return centroids_KD, labels_N


def share_out(want_G: Tensor, most_G: Tensor, total: int) -> Tensor:
    """`total` things in proportion to `want`: at least one where `most` is above 0, and at most `most` each."""
    share_G = (most_G > 0).long()
    while (left := total - int(share_G.sum())) > 0:
        room_G = most_G - share_G
        wish_G = torch.where(room_G > 0, want_G.double() + 1e-12 * float(want_G.sum() or 1.0), 0.0)
        more_G = torch.minimum((wish_G / wish_G.sum() * left).floor().long(), room_G)
        if not more_G.any():  # less than one each: the largest wishes get it
            more_G[(wish_G / (share_G + 1)).topk(min(left, int((room_G > 0).sum()))).indices] = 1
        share_G += more_G
    return share_G
