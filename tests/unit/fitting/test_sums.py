"""Least squares for vectors that are sums of shared rows."""

# Shapes: N vectors, K rows a vector is the sum of, R rows in all, D dimensions, S slots of factors.

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embstore.errors import DataError
from embstore.fitting.sums import best_factors, best_rows


def design(index_NK: Tensor, factors_NK: Tensor, num_rows: int) -> Tensor:
    """The matrix [N, R] that takes rows to sums."""
    matrix_NR = torch.zeros(len(index_NK), num_rows, dtype=torch.float64)
    for k in range(index_NK.shape[1]):
        matrix_NR[torch.arange(len(index_NK)), index_NK[:, k]] += factors_NK[:, k].double()
    return matrix_NR


@settings(max_examples=30)
@given(n=st.integers(1, 40), k=st.integers(1, 3), r=st.integers(1, 12), weighted=st.booleans(), seed=st.integers(0, 99))
def test_best_rows_are_the_least_squares_rows(n: int, k: int, r: int, weighted: bool, seed: int) -> None:
    """The error is that of a dense solver, whatever rows, factors and weights."""
    generator = torch.Generator().manual_seed(seed)
    vectors_ND = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    index_NK = torch.randint(r, (n, k), generator=generator)
    factors_NK = torch.randn(n, k, dtype=torch.float64, generator=generator)
    weights_N = torch.rand(n, dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    found_RD = best_rows(vectors_ND, index_NK, r, weights_N=weights_N, factors_NK=factors_NK, tolerance=0)
    matrix_NR = design(index_NK, factors_NK, r)
    root_N1 = (torch.ones(n) if weights_N is None else weights_N).double().sqrt()[:, None]
    best_RD = torch.linalg.lstsq(matrix_NR * root_N1, vectors_ND * root_N1, driver="gelsd").solution
    error, least = (((matrix_NR @ rows - vectors_ND) * root_N1).square().sum() for rows in (found_RD, best_RD))
    assert float(error) <= float(least) + 1e-6 * float((vectors_ND * root_N1).square().sum())


def test_best_factors_are_the_least_squares_factors() -> None:
    """Slot by slot those of a dense solver; a slot without vectors has factors of 1."""
    generator = torch.Generator().manual_seed(0)
    vectors_ND = torch.randn(60, 5, dtype=torch.float64, generator=generator)
    rows_RD = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    index_NK, slot_N = torch.randint(9, (60, 2), generator=generator), torch.randint(6, (60,), generator=generator)
    weights_N = torch.rand(60, dtype=torch.float64, generator=generator)
    found_SK = best_factors(vectors_ND, index_NK, rows_RD, slot_N, 7, weights_N=weights_N)
    assert found_SK[6].tolist() == [1.0, 1.0]
    for slot in range(6):
        here = slot_N == slot
        root = weights_N[here].sqrt()[:, None, None]
        matrix = (rows_RD[index_NK[here]].transpose(1, 2) * root).reshape(-1, 2)
        expected = torch.linalg.lstsq(matrix, (vectors_ND[here][:, :, None] * root).reshape(-1, 1)).solution
        torch.testing.assert_close(found_SK[slot], expected[:, 0], rtol=1e-5, atol=1e-6)


def test_rows_outside_the_table_are_no_fit() -> None:
    """A row that does not exist is named."""
    with pytest.raises(DataError, match=r"row 3 is outside \[0, 3\)"):
        best_rows(torch.ones(2, 2), torch.tensor([[0], [3]]), 3)
    with pytest.raises(DataError, match="one line a vector"):
        best_rows(torch.ones(2, 2), torch.zeros(3, 1, dtype=torch.int64), 3)
