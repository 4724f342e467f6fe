"""A Redis tier in a running event loop, and what the tests of it do over and over."""

# Shapes: M rows asked for.

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvloop

from embstore.table import Table
from server.cache.circuit_breaker import Breaker
from server.cache.redis_cache import RedisCache
from support.cache_cases import Counts, full_table, same_bits, truth

TABLE = full_table()
ROWS = np.arange(0, 1500, dtype=np.int64)
PATIENT_S = 2.0  # a busy test machine is not what most of these tests are about


@asynccontextmanager
async def tier_at(url: str, counts: Counts, **options: Any) -> AsyncIterator[RedisCache]:
    """A tier that probes soon, connected if it can."""
    options = {"timeout_s": PATIENT_S, "num_connections": 2} | options
    breaker = Breaker(counts.lookups.set_breaker, min_wait_s=0.05, max_wait_s=0.2)
    tier = RedisCache(url, counts.lookups, breaker=breaker, writes=Breaker(min_wait_s=0.05, max_wait_s=0.2), **options)
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


def running(url: str, test: Callable[[RedisCache, Counts], Awaitable[None]], **options: Any) -> Counts:
    """Run a test with a tier; what it counted."""
    counts = Counts()

    async def run() -> None:
        async with tier_at(url, counts, **options) as tier:
            await test(tier, counts)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    return counts


async def ask(tier: RedisCache, rows: Any = ROWS, table: Table = TABLE) -> int:
    """How many rows it had: those are right to the last bit, and nothing else was written."""
    rows = np.asarray(rows, np.int64)
    out = np.full((len(rows), table.embedding_dim), np.nan, np.float32)
    hits = await tier.get(table, rows, out)
    assert same_bits(out[hits], truth(table, rows[hits]))
    assert np.isnan(out[~hits]).all()
    return int(hits.sum())


async def put(tier: RedisCache, rows: Any = ROWS, table: Table = TABLE) -> None:
    """Write the true vectors of rows, and wait for it."""
    rows = np.asarray(rows, np.int64)
    tier.put_soon(table, rows, truth(table, rows))
    await tier.flush()


async def until(ready: Callable[[], Any], what: str) -> None:
    """Poll until `ready()`."""
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end, f"waited for {what}"
        await asyncio.sleep(0.01)
