"""The figures of a compression, against brute force."""

# Shapes: N vectors, D dimensions, Q queries, K neighbours.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.compressing import COUNTS, VECTORS, N

from embstore.compress.measure import measure, nearest_neighbours

RANDOM = np.random.default_rng(21)


def lookup_of(approx_ND: Any) -> Any:
    """A lookup of given vectors."""

    def lookup(rows_B: Any, out_BD: Any) -> None:
        out_BD[:] = approx_ND[rows_B]

    return lookup


@pytest.mark.parametrize("chunk", [1 << 22, 700])
def test_figures_are_their_formulas(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Errors, cosines of hot and tail ids, and tenths by popularity, against brute force."""
    monkeypatch.setattr("embstore.fitting.checks.CHUNK_ELEMENTS", chunk)
    approx_ND = (VECTORS + 0.3 * RANDOM.normal(size=VECTORS.shape)).astype(np.float32)
    measured = measure(VECTORS, lookup_of(approx_ND), counts_N=COUNTS.astype(float))
    quality, x, y = measured.quality, VECTORS.astype(float), approx_ND.astype(float)

    def error(rows: Any, w: Any) -> Any:
        return pytest.approx(math.sqrt((w * ((x - y)[rows] ** 2).sum(1)).sum() / (w * (x[rows] ** 2).sum(1)).sum()))

    order = np.argsort(-COUNTS, kind="stable")
    cosine_N = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert quality.relative_error == error(order, COUNTS[order])
    assert quality.relative_error_unweighted == error(order, 1.0)
    assert quality.error_by_popularity == [error(rows, 1.0) for rows in np.split(order, 10)]
    for name, rows in (("all", order), ("hot", order[: N // 100]), ("tail", order[N // 100 :])):
        found = quality.cosines[name]
        assert found.num_ids == len(rows)
        for percentile in (1, 5, 25, 50, 95):
            expected = np.percentile(cosine_N[rows], percentile)
            assert found.percentiles[f"p{percentile}"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("chunk", [1 << 22, 9000])
@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_recall_is_by_brute_force(monkeypatch: pytest.MonkeyPatch, similarity: str, chunk: int) -> None:
    """The neighbours are the most similar other ids, whatever the block size; recall is the share that stays."""
    monkeypatch.setattr("embstore.fitting.checks.CHUNK_ELEMENTS", chunk)
    approx_ND = (VECTORS + 0.3 * RANDOM.normal(size=VECTORS.shape)).astype(np.float32)
    neighbours = list[Any]()
    for table_ND in (VECTORS, approx_ND):
        other_ND = table_ND / np.linalg.norm(table_ND, axis=1, keepdims=True) if similarity == "cosine" else table_ND
        scores_NN = table_ND.astype(float) @ other_ND.T.astype(float)
        np.fill_diagonal(scores_NN, -np.inf)
        neighbours.append(np.argsort(-scores_NN, axis=1)[:, :10])
        found_QK = nearest_neighbours(table_ND, np.arange(N), 10, similarity)
        np.testing.assert_array_equal(np.sort(found_QK), np.sort(neighbours[-1]))
    shares = [len({*before} & {*after}) / 10 for before, after in zip(*neighbours, strict=True)]
    recall = measure(VECTORS, lookup_of(approx_ND)).quality.recall
    assert recall is not None
    assert (recall.neighbours, recall.num_queries) == (10, N)
    assert getattr(recall, similarity) == pytest.approx(np.mean(shares))


def test_queries_are_a_sample_of_a_large_table() -> None:
    """Recall asks for the neighbours of at most a thousand ids."""
    vectors_ND = RANDOM.normal(size=(1500, 3)).astype(np.float32)
    recall = measure(vectors_ND, lookup_of(vectors_ND)).quality.recall
    assert recall is not None
    assert (recall.num_queries, recall.cosine) == (1000, 1)


def test_vectors_of_zeros_have_no_direction() -> None:
    """Vectors of zeros are left out of the cosines; one that became zeros counts as 0; what does not exist is None."""
    x_ND = np.array([[0, 0], [1, 0], [1, 1]], np.float32)
    found = measure(x_ND, lookup_of(np.array([[1, 0], [0, 0], [2, 2]], np.float32))).quality.cosines["all"]
    assert (found.num_ids, found.percentiles["p50"]) == (2, pytest.approx(0.5))
    nothing = measure(np.zeros((1, 2), np.float32), lookup_of(np.ones((1, 2), np.float32)), counts_N=np.ones(1)).quality
    assert (nothing.relative_error, nothing.recall, nothing.error_by_popularity) == (None, None, [None])
    assert [(group.num_ids, group.percentiles) for group in nothing.cosines.values()] == [(0, {})] * 3
