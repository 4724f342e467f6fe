"""How close compressed vectors are to the ones they stand for: errors, angles, nearest neighbours."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embstore.errors import ConfigError
from embstore.fitting.checks import chunks, relative

Floats = NDArray[np.float32]
Lookup = Callable[[NDArray[np.int64], Floats], None]
"""Writes the vectors of rows [B] into an array [B, D]."""

PERCENTILES = (1, 5, 25, 50, 95)
NUM_QUERIES = 1000
NUM_NEIGHBOURS = 10
NUM_GROUPS = 10
HOT_SHARE = 0.01
SIMILARITIES = ("cosine", "inner_product")


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Cosines between the vectors of one group of ids, before and after: how many, and percentiles by name (`p1`).

    A vector of zeros has no direction and is left out; one that became zeros counts as 0.
    """

    num_ids: int
    percentiles: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The share of a query's nearest neighbours (itself left out) that are still among them afterwards, on average."""

    neighbours: int
    num_queries: int
    cosine: float
    inner_product: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The figures of a report, all relative to the vectors as they were.

    relative_error: sqrt(sum w |x - y|^2 / sum w |x|^2) with the counts as weights (None without counts, or where all
    vectors are zeros); relative_error_unweighted: with every id alike.
    cosines: `all` ids; with counts also `hot`, the HOT_SHARE of the ids with the highest counts (at least one), and
    `tail`, the others.
    error_by_popularity: with counts, relative errors of ten equal groups of ids, the most frequent first.
    """

    relative_error: float | None
    relative_error_unweighted: float | None
    cosines: dict[str, Cosines]
    recall: Recall | None
    error_by_popularity: list[float | None] | None


@dataclass(frozen=True, eq=False)
class Measured:
    """A report's figures and the cosine of each id (NaN where there is none), and which ids are hot, for plots."""

    quality: Quality
    cosine_N: Floats
    hot_N: NDArray[np.bool_] | None


def measure(
    vectors_ND: Floats, lookup: Lookup, *, counts_N: NDArray[np.float64] | None = None, seed: int = 0
) -> Measured:
    """Look every row up once and compare; the queries of recall are drawn evenly by `seed`."""
    approx_ND = np.empty_like(vectors_ND)
    for at in chunks(*vectors_ND.shape):
        lookup(np.arange(at.start, at.stop), approx_ND[at])
    error_N, energy_N, cosine_N = _by_id(vectors_ND, approx_ND)
    hot_N = order_N = None
    if counts_N is not None:
        order_N = np.argsort(-counts_N, kind="stable")
        hot_N = np.zeros(len(counts_N), np.bool_)
        hot_N[order_N[: math.ceil(HOT_SHARE * len(counts_N))]] = True
    quality = Quality(
        relative_error=None if counts_N is None else _relative(error_N, energy_N, counts_N / counts_N.max()),
        relative_error_unweighted=_relative(error_N, energy_N, np.ones(len(error_N))),
        cosines=_cosines(cosine_N, hot_N),
        recall=recall(vectors_ND, approx_ND, seed=seed),
        error_by_popularity=None if order_N is None else _by_group(error_N, energy_N, order_N),
    )
    return Measured(quality, cosine_N, hot_N)


def recall(vectors_ND: Floats, approx_ND: Floats, *, seed: int = 0) -> Recall | None:
    """Recall of the nearest neighbours among all ids for at most NUM_QUERIES of them; None for a single id."""
    num_ids = len(vectors_ND)
    neighbours = min(NUM_NEIGHBOURS, num_ids - 1)
    if neighbours < 1:
        return None
    queries_Q = np.sort(np.random.default_rng(seed).permutation(num_ids)[:NUM_QUERIES])
    shares = dict[str, float]()
    for similarity in SIMILARITIES:
        before_QK, after_QK = (
            nearest_neighbours(table_ND, queries_Q, neighbours, similarity) for table_ND in (vectors_ND, approx_ND)
        )
        kept_Q = (before_QK[:, :, None] == after_QK[:, None, :]).any(axis=2).mean(axis=1)
        shares[similarity] = float(kept_Q.mean())
    return Recall(neighbours=neighbours, num_queries=len(queries_Q), **shares)


def nearest_neighbours(
    table_ND: Floats, queries_Q: NDArray[np.int64], neighbours: int, similarity: str
) -> NDArray[np.int64]:
    """The rows most similar to each query row, [Q, K], without itself: a product with every row, block by block."""
    if similarity not in SIMILARITIES:
        raise ConfigError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    queries_QD = torch.from_numpy(table_ND[queries_Q])
    best_QK = torch.full((len(queries_Q), 0), -math.inf)
    rows_QK = torch.full((len(queries_Q), 0), -1, dtype=torch.int64)
    for at in chunks(len(table_ND), max(len(queries_Q), table_ND.shape[1])):
        block_nD = torch.from_numpy(table_ND[at])
        if similarity == "cosine":  # the query's own length does not change its order
            block_nD = torch.nn.functional.normalize(block_nD, dim=1)
        scores_Qn = queries_QD @ block_nD.T
        own_q = np.flatnonzero((queries_Q >= at.start) & (queries_Q < at.stop))
        scores_Qn[own_q, queries_Q[own_q] - at.start] = -math.inf
        found_QK, place_QK = scores_Qn.topk(min(neighbours, scores_Qn.shape[1]), dim=1)
        best_QK, rows_QK = torch.cat([best_QK, found_QK], dim=1), torch.cat([rows_QK, place_QK + at.start], dim=1)
        best_QK, place_QK = best_QK.topk(min(neighbours, best_QK.shape[1]), dim=1)
        rows_QK = rows_QK.gather(1, place_QK)
    return rows_QK.numpy()


def _by_id(vectors_ND: Floats, approx_ND: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64], Floats]:
    """Squared error, squared length and cosine of every id, in float64."""
    error_N, energy_N = np.empty(len(vectors_ND)), np.empty(len(vectors_ND))
    cosine_N = np.empty(len(vectors_ND), np.float32)
    for at in chunks(*vectors_ND.shape):
        x_nD, y_nD = vectors_ND[at].astype(np.float64), approx_ND[at].astype(np.float64)
        error_N[at], energy_N[at] = np.square(x_nD - y_nD).sum(axis=1), np.square(x_nD).sum(axis=1)
        product_n, lengths_n = (x_nD * y_nD).sum(axis=1), np.sqrt(energy_N[at]) * np.linalg.norm(y_nD, axis=1)
        cosine_n = np.divide(product_n, lengths_n, out=np.zeros_like(product_n), where=lengths_n > 0)
        cosine_N[at] = np.where(energy_N[at] > 0, np.clip(cosine_n, -1, 1), np.nan)
    return error_N, energy_N, cosine_N


def _relative(error_N: NDArray[np.float64], energy_N: NDArray[np.float64], mass_N: NDArray[np.float64]) -> float | None:
    """None instead of infinity: metrics are numbers that JSON has."""
    found = relative(float(mass_N @ error_N), float(mass_N @ energy_N))
    return found if math.isfinite(found) else None


def _cosines(cosine_N: Floats, hot_N: NDArray[np.bool_] | None) -> dict[str, Cosines]:
    groups = {"all": cosine_N}
    if hot_N is not None:
        groups |= {"hot": cosine_N[hot_N], "tail": cosine_N[~hot_N]}
    found = dict[str, Cosines]()
    for name, group in groups.items():
        group = group[~np.isnan(group)]
        values = np.percentile(group, PERCENTILES).tolist() if len(group) else []
        percentiles = {f"p{p}": float(value) for p, value in zip(PERCENTILES, values, strict=bool(values))}
        found[name] = Cosines(num_ids=len(group), percentiles=percentiles)
    return found


def _by_group(
    error_N: NDArray[np.float64], energy_N: NDArray[np.float64], order_N: NDArray[np.int64]
) -> list[float | None]:
    groups = np.array_split(order_N, min(NUM_GROUPS, len(order_N)))
    return [_relative(error_N[rows], energy_N[rows], np.ones(len(rows))) for rows in groups]
