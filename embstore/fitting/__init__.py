"""The numerics of fitting a scheme to given vectors: weighted clustering, factorisation and distillation.

Everything here takes vectors float [N, D] and, where asked, one weight per vector (its popularity), and minimises
`sum_n w_n |x_n - y_n|^2` over what it returns. Vectors are read in chunks, so they may be a memory map; the device is
the vectors' own. On the CPU results depend on nothing but the arguments and the generator's state.
"""

from __future__ import annotations

from embstore.fitting.checks import Progress
from embstore.fitting.distill import distill
from embstore.fitting.kmeans import nearest_centroids, weighted_kmeans
from embstore.fitting.linear import rank_one_per_bucket, weighted_bucket_means, weighted_svd

__all__ = [
    "Progress",
    "distill",
    "nearest_centroids",
    "rank_one_per_bucket",
    "weighted_bucket_means",
    "weighted_kmeans",
    "weighted_svd",
]
