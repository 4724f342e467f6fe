"""The rows of one version that are asked for most, in this process: fixed memory, every operation a compiled loop.

A cache in sets of eight rows. How often rows are asked for decides what stays (TinyLFU): a scan does not push out
what is hot, and counts age, so what was hot does. `embstore/kernels/cpu_hot.py` has the layout.
"""

# Shapes: B rows in a batch, M rows that are not there, D embedding_dim, S sets, C rows of capacity, K rows listed.

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ConfigError
from embstore.kernels import Loops

cpu_hot = Loops("cpu.hot")

EPOCH = 10
"""Counts are halved when so many times the capacity was taken: more remember longer, fewer forget sooner."""
_SETS_AT_ONCE = 4096
_PAGE = 4096
_ALIGN = 128
"""Bytes of a set's two cache lines: processors fetch them together."""

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class HotRows:
    """Vectors of row numbers of one immutable version, at most `num_rows` of them, in at most `num_bytes`.

    Any thread may call. A call runs under the GIL in pieces of a few thousand ids, each of them atomic: nothing waits
    for a lock, and nobody sees half a row. All memory is the process's from the beginning: no call waits for the
    system to give it any, which took 5 ms for each 2 MB on a virtual machine that had not used them before.
    """

    def __init__(self, embedding_dim: int, num_bytes: int) -> None:
        set_words, ways = cpu_hot.WORDS, cpu_hot.WAYS
        set_bytes, fixed = 8 * set_words + 4 * ways * embedding_dim, _ALIGN + 16
        num_sets = (num_bytes - fixed) // set_bytes
        if num_sets < 1:
            raise ConfigError(
                f"a cache of {num_bytes:,} bytes holds no rows of {embedding_dim:,} floats; "
                f"it takes at least {fixed + set_bytes:,} bytes"
            )
        self.embedding_dim, self.num_rows = embedding_dim, num_sets * ways
        memory = np.zeros(fixed + num_sets * set_bytes, np.uint8)
        self.num_bytes = memory.nbytes
        memory[::_PAGE] = 0  # here, without the GIL, and not by `put`, which holds it
        start = -memory.ctypes.data % _ALIGN
        ends = np.cumsum([start, 8 * set_words * num_sets, 4 * embedding_dim * self.num_rows, 16])
        sets, vectors, clock = (memory[a:b] for a, b in pairwise(ends))
        self._sets_SW = sets.view(np.uint64).reshape(num_sets, set_words)
        self._vectors_CD = vectors.view(np.float32).reshape(self.num_rows, embedding_dim)
        self._clock = clock.view(np.int64)
        self._clock[:] = 0, EPOCH * self.num_rows
        self._ids_a_call = min(4096, max(16, (1 << 20) // (4 * embedding_dim)))
        self._take, self._put = cpu_hot.take, cpu_hot.put

    def take(self, rows_B: Rows, out_BD: Floats) -> Rows:
        """Copy the vectors that are here into `out_BD`; the positions of those that are not, ascending.

        A row below 0 is neither: its vector is left alone.
        """
        num_ids = len(rows_B)
        self._check(num_ids, out_BD)
        misses_B, num_misses = np.empty(num_ids, np.int64), 0
        for start in range(0, num_ids, self._ids_a_call):
            stop = min(start + self._ids_a_call, num_ids)
            num_misses = self._take(
                self._sets_SW, self._vectors_CD, self._clock, rows_B, out_BD, start, stop, misses_B, num_misses
            )
        return misses_B[:num_misses]

    def put(self, rows_M: Rows, vectors_MD: Floats) -> None:
        """Offer rows with their vectors: kept where there is room, or where they are asked for more than what is."""
        num_ids = len(rows_M)
        self._check(num_ids, vectors_MD)
        for start in range(0, num_ids, self._ids_a_call):
            stop = min(start + self._ids_a_call, num_ids)
            self._put(self._sets_SW, self._vectors_CD, self._clock, rows_M, vectors_MD, start, stop)

    def hottest(self, limit: int) -> Rows:
        """At most `limit` of the rows that are here, those taken most of late first."""
        rows_C, ranks_C, num_rows = np.empty(self.num_rows, np.int64), np.empty(self.num_rows, np.uint16), 0
        for first in range(0, len(self._sets_SW), _SETS_AT_ONCE):
            last = min(first + _SETS_AT_ONCE, len(self._sets_SW))
            num_rows += cpu_hot.rank(self._sets_SW, self._clock, first, last, rows_C[num_rows:], ranks_C[num_rows:])
        order = np.argsort(~ranks_C[:num_rows], kind="stable")
        return rows_C[order[: max(limit, 0)]]

    def _check(self, num_ids: int, vectors: Floats) -> None:
        if vectors.shape != (num_ids, self.embedding_dim):  # the loops do not look
            raise ValueError(f"expected vectors [{num_ids}, {self.embedding_dim}], got {list(vectors.shape)}")
