"""The load's ids are seeded, in range, and as skewed as they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.workload.prewritten import zipf_ids


def test_ids_are_the_same_for_the_same_seed() -> None:
    """A run can be repeated."""
    np.testing.assert_array_equal(zipf_ids(1000, 5, 20, seed=3), zipf_ids(1000, 5, 20, seed=3))
    assert (zipf_ids(1000, 5, 20, seed=3) != zipf_ids(1000, 5, 20, seed=4)).any()


@pytest.mark.parametrize("exponent", [0.0, 1.05, 1.5])
def test_shares_follow_the_exponent(exponent: float) -> None:
    """The hottest id has the share that the law gives it; uniform at exponent 0."""
    num_ids, draws = 50, 200_000
    ids = zipf_ids(num_ids, 1, draws, exponent=exponent)[0]
    counts = np.sort(np.bincount(ids, minlength=num_ids))[::-1]
    law = np.arange(1, num_ids + 1) ** -exponent
    expected = law / law.sum() * draws
    assert counts.sum() == draws
    assert abs(counts[0] - expected[0]) < 6 * np.sqrt(expected[0]) + 200


def test_nonsense_sizes_are_refused() -> None:
    """No ids to draw from is an error, not an empty answer."""
    with pytest.raises(ValueError, match="at least 1"):
        zipf_ids(0, 1, 1)
