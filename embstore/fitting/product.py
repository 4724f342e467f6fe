"""Fitting a product quantiser: k-means in every part of the vectors, after a rotation and in stages where asked.

Product quantisation: Jegou, Douze and Schmid, TPAMI 2011. Rotation: Ge, He, Ke and Sun, "Optimized Product
Quantization", TPAMI 2014: principal axes shared out so that every part gets about the same product of variances, then
rounds that alternate between codes, codebooks and the best rotation (orthogonal Procrustes).
"""

# Shapes: N vectors, P points drawn from them, D dimensions, M parts, W = D / M columns of a part, S stages,
# K codes of a part and stage.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from embstore.errors import ConfigError
from embstore.fitting.checks import Progress, checked, chunks, weighted_mean, working
from embstore.fitting.kmeans import nearest_centroids, weighted_kmeans
from embstore.fitting.linear import weighted_bucket_means

ROTATION_POINTS = 32_768
ROTATION_ROUNDS = 10
POINTS = 128
"""A codeword that k-means runs on; twice as many take twice the time for half a percent less error."""
STAGE_ROUNDS = 4
RIDGE = 1e-9
"""What keeps codewords where they are that the codes leave open, as a share of the largest weight of a code."""


class ProductCodes(NamedTuple):
    """codes uint8 [N, S M], stage by stage; codebooks [S M K, W], in the codes' order; rotation [D, D], or None.

    A vector is the sum over stages of its codewords side by side, times the rotation.
    """

    codes: Tensor
    codebooks: Tensor
    rotation: Tensor | None


def product_codes(
    vectors_ND: Tensor,
    num_parts: int,
    num_codes: int,
    *,
    num_stages: int = 1,
    rotation: bool = False,
    weights_N: Tensor | None = None,
    iterations: int = 25,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> ProductCodes:
    """Codes and codebooks that make `sum w |x - decoded|^2` small; DataError when vectors or weights cannot be used.

    The codebooks are the least squares optimum for the codes. With at least as many codes as vectors, one stage and no
    rotation, decoding is exact.
    """
    mass_N = checked(vectors_ND, weights_N)
    if vectors_ND.shape[1] % num_parts or not 1 <= num_codes <= 256:
        raise ConfigError(f"{vectors_ND.shape[1]} columns cannot be {num_parts} parts of {num_codes} codes each")
    rotation_DD = _rotation(vectors_ND, mass_N, num_parts, num_codes, generator) if rotation else None
    codes_NC = torch.empty(len(vectors_ND), num_stages * num_parts, dtype=torch.uint8, device=vectors_ND.device)
    books = []
    for part in range(num_parts):
        x_NW = _part(vectors_ND, num_parts, part, rotation_DD)
        codes_NS, books_SKW = _fit_part(x_NW, num_codes, num_stages, mass_N, iterations, generator)
        codes_NC[:, part::num_parts] = codes_NS.to(torch.uint8)
        books.append(books_SKW)
        if progress is not None:
            progress("codebooks", part + 1, num_parts)
    return ProductCodes(codes_NC, torch.stack(books, dim=1).flatten(0, 2), rotation_DD)


def _part(vectors_ND: Tensor, num_parts: int, part: int, rotation_DD: Tensor | None) -> Tensor:
    """One part of all vectors, rotated: [N, W]."""
    width = vectors_ND.shape[1] // num_parts
    columns = slice(part * width, (part + 1) * width)
    if rotation_DD is None:
        return working(vectors_ND[:, columns])
    axes_DW = rotation_DD[columns].T
    return torch.cat([working(vectors_ND[at]) @ axes_DW for at in chunks(*vectors_ND.shape)])


def _fit_part(
    x_NW: Tensor, num_codes: int, num_stages: int, mass_N: Tensor, iterations: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Codes [N, S] and codewords [S, K, W] of one part."""
    rest_NW, codes, books = x_NW, [], []
    for _ in range(num_stages):
        book_KW, codes_N = weighted_kmeans(
            rest_NW,
            num_codes,
            weights_N=mass_N,
            iterations=iterations,
            generator=generator,
            max_points_per_cluster=POINTS,
        )
        rest_NW = rest_NW - book_KW[codes_N]
        codes.append(codes_N)
        books.append(book_KW)
    codes_NS, books_SKW = torch.stack(codes, dim=1), torch.stack(books)
    if num_stages == 1:
        return codes_NS, weighted_bucket_means(x_NW, codes_NS[:, 0], num_codes, mass_N)[None]
    for _ in range(STAGE_ROUNDS):
        books_SKW = _best_codewords(x_NW, codes_NS, books_SKW, mass_N)
        for stage in range(num_stages):
            others_NW = _decoded(codes_NS, books_SKW) - books_SKW[stage, codes_NS[:, stage]]
            codes_NS[:, stage] = nearest_centroids(x_NW - others_NW, books_SKW[stage])[0]
    return codes_NS, _best_codewords(x_NW, codes_NS, books_SKW, mass_N)


def _decoded(codes_NS: Tensor, books_SKW: Tensor) -> Tensor:
    return books_SKW[torch.arange(len(books_SKW), device=codes_NS.device), codes_NS].sum(dim=1)


def _best_codewords(x_NW: Tensor, codes_NS: Tensor, books_SKW: Tensor, mass_N: Tensor) -> Tensor:
    """The codewords of all stages at once that minimise the weighted squared error of these codes.

    Least squares over S K unknowns a column. A number may move from one stage to another at no cost, so the change from
    the codewords of before is what is solved for, and the smallest is taken.
    """
    num_stages, num_codes, _ = books_SKW.shape
    size = num_stages * num_codes
    index_NS = codes_NS + num_codes * torch.arange(num_stages, device=codes_NS.device)
    gram = torch.zeros(size * size, dtype=torch.float64, device=x_NW.device)
    against = torch.zeros(size, x_NW.shape[1], dtype=torch.float64, device=x_NW.device)
    heavy_NW = (x_NW.double() - _decoded(codes_NS, books_SKW.double())) * mass_N[:, None]
    for s in range(num_stages):
        against.index_add_(0, index_NS[:, s], heavy_NW)
        for t in range(num_stages):
            gram.index_add_(0, index_NS[:, s] * size + index_NS[:, t], mass_N)
    gram = gram.view(size, size)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().max()))
    change = torch.linalg.solve(gram, against).view(books_SKW.shape)
    best_SKW: Tensor = (books_SKW.double() + change).to(books_SKW.dtype)
    return best_SKW


def _rotation(
    vectors_ND: Tensor, mass_N: Tensor, num_parts: int, num_codes: int, generator: torch.Generator | None
) -> Tensor:
    """An orthogonal matrix R [D, D]: parts of x R^T are quantised with a small error. Learned on points by weight."""
    rotation_DD = balanced_axes(vectors_ND, mass_N, num_parts)
    points_PD, mass_P = vectors_ND, mass_N
    if len(vectors_ND) > ROTATION_POINTS:
        random_P = torch.rand(ROTATION_POINTS, dtype=torch.float64, generator=generator).to(mass_N.device)
        cumulated_N = mass_N.cumsum(dim=0)
        drawn_P = torch.searchsorted(cumulated_N, random_P * cumulated_N[-1], right=True)
        points_PD, mass_P = vectors_ND[drawn_P.clamp_max(len(mass_N) - 1)], torch.ones_like(mass_N[:ROTATION_POINTS])
    points_PD = working(points_PD)
    if num_codes >= len(points_PD):
        return rotation_DD  # every vector is its own codeword, however it lies
    books: list[Tensor] = []
    for _ in range(ROTATION_ROUNDS):
        decoded = []
        for part in range(num_parts):
            x_PW = _part(points_PD, num_parts, part, rotation_DD)
            if len(books) == part:
                books.append(weighted_kmeans(x_PW, num_codes, weights_N=mass_P, iterations=5, generator=generator)[0])
            codes_P, _ = nearest_centroids(x_PW, books[part])
            books[part] = weighted_bucket_means(x_PW, codes_P, num_codes, mass_P)
            decoded.append(books[part][codes_P])
        heavy_PD = torch.cat(decoded, dim=1).double() * mass_P[:, None]
        left_DD, _, right_DD = torch.linalg.svd(heavy_PD.T @ points_PD.double())
        rotation_DD = (left_DD @ right_DD).to(points_PD.dtype)
    return rotation_DD


def balanced_axes(vectors_ND: Tensor, mass_N: Tensor, num_parts: int) -> Tensor:
    """The principal axes as rows [D, D], in an order that gives every part about the same product of variances.

    Axes go, the longest first, to the part whose product is the least so far and that has room.
    """
    dim = vectors_ND.shape[1]
    mean_D = weighted_mean(vectors_ND, mass_N)
    covariance_DD = torch.zeros((dim, dim), dtype=torch.float64, device=vectors_ND.device)
    for at in chunks(*vectors_ND.shape):
        centred_nD = vectors_ND[at].double() - mean_D
        covariance_DD += (centred_nD * mass_N[at, None]).T @ centred_nD
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD / mass_N.sum())
    unit = max(float(variance_D[0]), 1e-6 * float(variance_D[-1])) or 1.0  # so that no axis lowers a product
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    log_product = [0.0] * num_parts
    for axis in reversed(range(dim)):  # eigenvalues rise
        open_parts = [part for part in range(num_parts) if len(parts[part]) < dim // num_parts]
        chosen = min(open_parts, key=lambda part: log_product[part])
        parts[chosen].append(axis)
        log_product[chosen] += float((variance_D[axis] / unit).clamp_min(1.0).log())
    order_D = torch.tensor([axis for part in parts for axis in part], device=vectors_ND.device)
    rows_DD: Tensor = axes_DD.T[order_D].to(working(vectors_ND[:0]).dtype)
    return rows_DD
