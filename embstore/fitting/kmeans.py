"""Weighted k-means: Lloyd's iterations from k-means++ seeds, on a sample where there are many points.

Lloyd 1982; seeding: Arthur and Vassilvitskii, SODA 2007, in the greedy form that tries a few points a step.
"""

# Shapes: N vectors, P points trained on, K clusters, D dimensions.

from __future__ import annotations

import math

import torch
from torch import Tensor

from embstore.errors import ConfigError, DataError
from embstore.fitting.checks import Progress, checked, chunks, largest, weighted_mean, working
from embstore.fitting.linear import bucket_sums

MAX_SEEDED = 512  # k-means++ takes a pass over the points per cluster; beyond, seeds are drawn at once
SEED_POINTS = 64  # per cluster: enough for seeds, the iterations see more
TOLERANCE = 1e-4  # an iteration that lowers the error by less than this is the last
NOISE = 16  # roundings: a squared distance below this many, of the squared lengths it comes from, is 0


def weighted_kmeans(
    vectors_ND: Tensor,
    num_clusters: int,
    *,
    weights_N: Tensor | None = None,
    iterations: int = 25,
    generator: torch.Generator | None = None,
    max_points_per_cluster: int = 256,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Centroids [K, D] and each vector's nearest one, int64 [N], that make `sum w |x - centroid|^2` small.

    With at least as many clusters as vectors each vector is its own centroid, and the rest repeat them. Empty
    clusters move to the vectors that are worst off. Trains on at most `max_points_per_cluster` vectors per cluster:
    the heaviest for one half, an even draw from the others for the other; all vectors are then assigned, and the
    centroids are the means of all of theirs. About `2 P K D` operations an iteration, fewer than `iterations` when
    the error stands still.
    """
    mass_N = checked(vectors_ND, weights_N)
    for name, value in (("num_clusters", num_clusters), ("max_points_per_cluster", max_points_per_cluster)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    num_vectors, device = len(vectors_ND), vectors_ND.device
    if num_clusters >= num_vectors:
        own_K = torch.arange(num_clusters, device=device)
        return working(vectors_ND)[own_K % num_vectors].clone(), own_K[:num_vectors].clone()

    points_PD, mass_P = _training_points(vectors_ND, mass_N, num_clusters * max_points_per_cluster, generator)
    unit = largest(points_PD) or 1.0  # squares of the points then stay finite
    centre_D = weighted_mean(points_PD, mass_P).to(points_PD.dtype)  # distances lose fewer digits near 0
    points_PD = (points_PD - centre_D) / unit
    centroids_KD = _seeds(points_PD, mass_P, num_clusters, generator)
    before = math.inf
    for iteration in range(iterations):
        labels_P, squares_P = nearest_centroids(points_PD, centroids_KD)
        losses_P = mass_P * squares_P.double()
        reseeded = _reseed(labels_P, losses_P, num_clusters)
        centroids_KD = _means(points_PD, labels_P, mass_P, centroids_KD)
        if progress is not None:
            progress("k-means", iteration + 1, iterations)
        error = float(losses_P.sum())
        if not reseeded and error >= before * (1 - TOLERANCE):
            break
        before = error

    centroids_KD = centroids_KD * unit + centre_D
    labels_N, _ = nearest_centroids(vectors_ND, centroids_KD)
    centroids_KD = _means(vectors_ND, labels_N, mass_N, centroids_KD)
    # What no vector needs repeats another: left where it was, it might be a hair's breadth from one, and be chosen.
    centroids_KD[torch.bincount(labels_N, minlength=num_clusters) == 0] = centroids_KD[labels_N[0]].clone()
    return centroids_KD, nearest_centroids(vectors_ND, centroids_KD)[0]


def nearest_centroids(vectors_ND: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every vector, int64 [N], and the squared distance to it [N]; the first of equals."""
    if vectors_ND.ndim != 2 or centroids_KD.ndim != 2 or vectors_ND.shape[1] != centroids_KD.shape[1]:
        raise DataError(f"vectors {list(vectors_ND.shape)} and centroids {list(centroids_KD.shape)} differ in width")
    centre_D = centroids_KD.mean(dim=0)
    unit = float((centroids_KD - centre_D).abs().max()) or 1.0
    centred_KD = (centroids_KD - centre_D) / unit
    half_K = centred_KD.square().sum(dim=1) / 2
    labels_N = torch.empty(len(vectors_ND), dtype=torch.int64, device=vectors_ND.device)
    squares_N = torch.empty(len(vectors_ND), dtype=centred_KD.dtype, device=vectors_ND.device)
    for at in chunks(len(vectors_ND), len(centroids_KD) + vectors_ND.shape[1]):
        x_nD = (vectors_ND[at].to(centred_KD.dtype) - centre_D) / unit
        closeness_n, labels_N[at] = torch.addmm(half_K, x_nD, centred_KD.T, beta=-1).max(dim=1)
        length_n = x_nD.square().sum(dim=1)
        square_n = length_n - 2 * closeness_n
        squares_N[at] = torch.where(square_n > NOISE * _eps(x_nD) * length_n, square_n, 0.0) * unit**2
    return labels_N, squares_N


def _training_points(
    vectors_ND: Tensor, mass_N: Tensor, most: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The vectors to train on and their weights, which stand for all: where some are left out, the rest weigh more."""
    num_vectors = len(vectors_ND)
    if num_vectors <= most:
        return working(vectors_ND), mass_N
    heavy_n = mass_N.topk(most // 2).indices
    others = torch.ones(num_vectors, dtype=torch.bool, device=mass_N.device)
    others[heavy_n] = False
    drawn_n = others.nonzero().squeeze(1)
    drawn_n = drawn_n[_permutation(len(drawn_n), generator, mass_N.device)[: most - most // 2]]
    left, kept = float(mass_N[others].sum()), float(mass_N[drawn_n].sum())
    drawn_mass_n = mass_N[drawn_n] * (left / kept if kept else 1.0)
    chosen_P = torch.cat([heavy_n, drawn_n])
    return working(vectors_ND[chosen_P]), torch.cat([mass_N[heavy_n], drawn_mass_n])


def _seeds(points_PD: Tensor, mass_P: Tensor, num_clusters: int, generator: torch.Generator | None) -> Tensor:
    """Points to start from: k-means++ for few clusters, an even draw for many."""
    order_P = _permutation(len(points_PD), generator, points_PD.device)
    if num_clusters > MAX_SEEDED:
        return points_PD[order_P[:num_clusters]]
    order_P = order_P[: num_clusters * SEED_POINTS]
    points_PD, mass_P = points_PD[order_P], mass_P[order_P]
    square_P = points_PD.square().sum(dim=1)
    num_tries = 2 + int(math.log(num_clusters))
    distance_P = torch.full_like(square_P, math.inf)
    chosen: list[int] = []
    for _ in range(num_clusters):
        losses_P = mass_P * distance_P.double() if chosen else mass_P
        if not float(losses_P.sum()) > 0:
            break  # every point (that weighs anything) is a seed already
        tries_T = _draw(losses_P, num_tries, generator)
        product_PT = points_PD @ points_PD[tries_T].T
        far_PT = square_P[:, None] + square_P[tries_T] - 2 * product_PT
        noise_PT = NOISE * _eps(far_PT) * (square_P[:, None] + square_P[tries_T])
        far_PT = torch.where(far_PT > noise_PT, far_PT, 0.0)
        left_PT = torch.minimum(distance_P[:, None], far_PT)
        best = int((mass_P @ left_PT.double()).argmin())
        distance_P = left_PT[:, best].contiguous()
        chosen.append(int(tries_T[best]))
    fill = [row for row in range(num_clusters) if row not in set(chosen)][: num_clusters - len(chosen)]
    return points_PD[torch.tensor(chosen + fill, device=points_PD.device)]


def _reseed(labels_P: Tensor, losses_P: Tensor, num_clusters: int) -> bool:
    """Give the empty clusters the points that are worst off, in place; whether there was anything to give."""
    empty_k = (torch.bincount(labels_P, minlength=num_clusters) == 0).nonzero().squeeze(1)
    worst_k = losses_P.topk(min(len(empty_k), len(losses_P))).indices
    worst_k = worst_k[losses_P[worst_k] > 0]
    labels_P[worst_k] = empty_k[: len(worst_k)]
    return len(worst_k) > 0


def _means(vectors_ND: Tensor, labels_N: Tensor, mass_N: Tensor, centroids_KD: Tensor) -> Tensor:
    """The weighted mean of every cluster; a cluster without weight stays where it is."""
    sums_KD, total_K = bucket_sums(vectors_ND, labels_N, len(centroids_KD), mass_N)
    means_KD = sums_KD / torch.where(total_K > 0, total_K, 1.0)[:, None]
    return torch.where(total_K[:, None] > 0, means_KD, centroids_KD.double()).to(centroids_KD.dtype)


def _draw(mass_P: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` positions, each with a probability in proportion to its mass; one without any is never drawn."""
    cumulated_P = mass_P.cumsum(dim=0)
    random = torch.rand(count, dtype=torch.float64, generator=generator, device=_device(generator, mass_P.device))
    drawn = torch.searchsorted(cumulated_P, random.to(mass_P.device) * cumulated_P[-1], right=True)
    return drawn.clamp_max(int(mass_P.nonzero()[-1]))


def _permutation(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randperm(count, generator=generator, device=_device(generator, device)).to(device)


def _eps(values: Tensor) -> float:
    return torch.finfo(values.dtype).eps


def _device(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Where random numbers are drawn: a generator draws on its own device."""
    return device if generator is None else generator.device
