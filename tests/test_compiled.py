"""Compiled loops without a place to keep their machine code."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from numba import types

from embstore.kernels.compiled import Kernel, compiled
from embstore.kernels.numba_rows import IDS, OUT, void


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
    from embstore.kernels.numba_gather import gather

    table = np.zeros((3, 2), np.float32)
    gather(table, np.arange(3), np.empty((3, 2), np.float32))
    loop = gather._compiled("f")
    assert loop._cache.cache_path
    assert sum(loop.stats.cache_hits.values()) + sum(loop.stats.cache_misses.values()) >= 1


def test_a_dtype_is_compiled_when_it_is_first_seen() -> None:
    """One loop, several storage dtypes: each gets code of its own, and a later call finds it."""
    calls: list[object] = []

    def fill(table, ids, out):  # type: ignore[no-untyped-def]
        for i in range(ids.shape[0]):
            out[i, 0] = table.itemsize

    def signature(table: object) -> object:
        calls.append(table)
        return void(table, IDS, OUT)

    loop, out = Kernel(fill, signature), np.empty((2, 1), np.float32)
    for dtype, size in ((np.float32, 4), (np.int16, 2), (np.uint8, 1), (np.float32, 4), (np.uint8, 1)):
        loop(np.zeros((3, 12), dtype), np.arange(2), out)
        assert (out == size).all()
    assert len(calls) == 3
