"""Large lookups over several threads: the loops release the GIL, so plain threads are enough."""

# Shapes: B ids, D embedding_dim.

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_cores(), thread_name_prefix="embstore-lookup")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parts(parts: int, lookup: Callable[[Any, Any], None], ids_B: Any, out_BD: Any) -> None:
    """`lookup(ids, out)` of equal slices at the same time, the last one on this thread; the first error is raised."""
    bounds = [len(ids_B) * part // parts for part in range(parts + 1)]
    slices = [slice(low, high) for low, high in pairwise(bounds)]
    waiting: list[Future[None]] = []
    try:
        waiting.extend(_pool().submit(lookup, ids_B[part], out_BD[part]) for part in slices[:-1])
        lookup(ids_B[slices[-1]], out_BD[slices[-1]])
    finally:  # no part may go on writing into `out` after this call
        errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error
