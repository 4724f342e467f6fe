"""What tests of compression share: vectors in clusters, counts with a long tail, string ids."""

from __future__ import annotations

import numpy as np

N, D = 400, 16
RANDOM = np.random.default_rng(20)
CENTRES = RANDOM.normal(size=(20, D))
VECTORS = (CENTRES[RANDOM.integers(20, size=N)] + 0.2 * RANDOM.normal(size=(N, D))).astype(np.float32)
COUNTS = RANDOM.permutation((2000 / np.arange(1, N + 1)).astype(np.int64))
KEYS = [f"item {key}" for key in RANDOM.permutation(N)]
