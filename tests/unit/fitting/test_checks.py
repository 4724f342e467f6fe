"""What every fit refuses."""

# Shapes: N vectors, D dimensions.

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.fits import Shared
from torch import Tensor

from embstore.errors import DataError
from embstore.fitting import (
    distill,
    rank_one_per_bucket,
    weighted_bucket_means,
    weighted_kmeans,
    weighted_svd,
)
from embstore.fitting.checks import relative

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
    """DataError names the first row that holds NaN or infinity."""
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
    """Weights of a wrong length, below 0, NaN or all 0 are named with their numbers."""
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


def test_nothing_is_far_from_nothing_and_anything_is_infinitely_far() -> None:
    """The relative error of vectors that are all 0 is 0 where nothing is wrong, else infinite."""
    assert [relative(0.0, 0.0), relative(1.0, 0.0), relative(1.0, 4.0)] == [0.0, float("inf"), 0.5]
