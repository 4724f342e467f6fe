"""Compiled loops without a place to keep their machine code."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from numba import types

from embstore.kernels.compiled import compiled


def test_a_loop_without_a_cache_still_works_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Where numba finds no place for machine code, a loop is compiled in memory, and the log has it."""
    namespace: dict[str, object] = {}
    exec("def double(x):\n    return 2 * x\n", namespace)  # a function without a file: numba cannot cache it
    with caplog.at_level(logging.WARNING):
        double = compiled(types.int64(types.int64))(namespace["double"])
    assert double(np.int64(21)) == 42
    assert "double is compiled without a cache" in caplog.text


def test_the_kernels_are_cached_on_disk() -> None:
    """Loops that have a file keep their code: a server does not compile at start."""
    from embstore.kernels.numba_cpu import gather

    assert gather._cache.cache_path
    assert sum(gather.stats.cache_hits.values()) + sum(gather.stats.cache_misses.values()) >= 1
