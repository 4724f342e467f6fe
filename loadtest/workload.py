"""Ids as production asks for them: long-tailed, hot ones scattered over the table, the same for the same seed."""

# Shapes: R requests, B ids in each.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def zipf_ids(
    num_ids: int, num_requests: int, ids_per_request: int, *, exponent: float = 1.05, seed: int = 0
) -> NDArray[np.int64]:
    """Ids [R, B] in `[0, num_ids)`: the k-th most frequent with probability ~ k ** -exponent, in no spatial order."""
    if num_ids < 1 or num_requests < 0 or ids_per_request < 0 or exponent < 0:
        raise ValueError("sizes must not be negative, num_ids at least 1, the exponent not below 0")
    generator = np.random.default_rng(seed)
    shares = np.cumsum(np.arange(1, num_ids + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(shares / shares[-1], generator.random((num_requests, ids_per_request)))
    scattered = generator.permutation(num_ids)
    return scattered[np.minimum(ranks, num_ids - 1)].astype(np.int64)
