"""Neighbours in rank are no neighbours in id: a fixed permutation of [0, n) that needs no table."""

# Shapes: B numbers.

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 5
"""With three, differences of neighbours are far from even; with four they are nearly, with five fully."""
TABLE = 1 << 20
"""Up to so many numbers the permutation is worked out once and looked up: faster, and the same."""


class Permutation:
    """A permutation of [0, n), fixed by n and the seed: a Feistel cipher, walked until it ends below n."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
        self.mask = (np.uint64(1) << self.half) - np.uint64(1)
        self.shift = np.uint64(64) - self.half
        self.rounds = np.random.default_rng([seed, 0x5CA7]).integers(1 << 63, size=ROUNDS, dtype=np.uint64) | np.uint64(
            1
        )
        self.table = self._walk(np.arange(n, dtype=np.int64)) if n <= TABLE else None

    def __call__(self, ranks_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each number in [0, n) goes."""
        return self._walk(ranks_B) if self.table is None else self.table[ranks_B]

    def _walk(self, ranks_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers at or above n go round again: each cycle of the cipher comes back below n."""
        out = self._cipher(ranks_B.astype(np.uint64))
        (above,) = np.nonzero(out >= self.n)
        while len(above):
            moved = self._cipher(out[above])
            out[above] = moved
            above = above[moved >= self.n]
        return out.astype(np.int64)

    def _cipher(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """A permutation of twice `half` bits."""
        left, right = x >> self.half, x & self.mask
        for key in self.rounds:  # the upper bits of a product depend on all bits below
            left, right = right, left ^ (((right + key) * key) >> self.shift)
        return (left << self.half) | right
