"""From ids to vectors: on the event loop when that is quick, in a thread or on the device's when it is not."""

# Shapes: B ids in a request, G bags of them, D embedding_dim.

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

import numpy as np

from embstore.errors import DataError, Unprocessable
from embstore.ids import Ids
from embstore.pooling import Bags
from embstore.table import Fetched, Floats, Table
from server.lookup.batcher import DynamicBatcher, uses_batching

if TYPE_CHECKING:
    from server.cache.cached_table import CachedTable

INLINE_SECONDS = 1e-3
"""What takes longer than this leaves the event loop to others: a thread costs a tenth of it."""
TIMED_ROWS = 512


class LookupService:
    """Looks up ids in a captured table; the table cannot change under it."""

    def __init__(
        self, *, inline_ids: int, num_threads: int, batcher: DynamicBatcher | None = None, batching: str = "off"
    ) -> None:
        self.inline_ids, self.batcher, self.batching = inline_ids, batcher, batching
        self.cached: dict[Table, CachedTable] = {}
        """Tables with a cache in front, which `attach` adds and `forget` takes away."""
        self.batched: set[Table] = set()
        """Tables whose lookups share launches."""
        self._inline: dict[Table, int] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lookup")

    def lookup(
        self, table: Table, ids: Ids, on_missing: str, out: Floats | None = None
    ) -> Fetched | Awaitable[Fetched]:
        """Vectors of B ids, float32 [B, D], and which were found; written into `out` where it is given."""
        cached = self.cached.get(table)
        if cached is not None:
            return cached.fetch(ids, on_missing, out)
        return self.compute(table, ids, on_missing, out)

    def compute(
        self, table: Table, ids: Ids, on_missing: str, out: Floats | None = None
    ) -> Fetched | Awaitable[Fetched]:
        """The same, by the table alone: here, in a thread, or in a launch shared with others."""
        if table in self.batched and self.batcher is not None:
            return self.batcher.fetch(table, ids, on_missing, out)
        if table.device == "cpu" and len(ids) <= self._inline.get(table, self.inline_ids):
            return table.fetch(ids, on_missing, out)
        return self.do(table.fetch, ids, on_missing, out)

    def is_direct(self, table: Table, num_ids: int) -> bool:
        """Whether a lookup of this many ids is just the table's own, here and now, and nobody wants it timed."""
        if num_ids > self._inline.get(table, self.inline_ids) or table in self.batched or table.device != "cpu":
            return False
        cached = self.cached.get(table)
        return cached is None or cached.policy.skips_cache(num_ids)

    def lookup_bags(self, table: Table, ids: Ids, on_missing: str, bags: Bags) -> Fetched | Awaitable[Fetched]:
        """One vector a bag of ids: float32 [G, D]; composed and pooled here, the cache of rows is not asked."""
        if table.device == "cpu" and max(bags.num_ids, bags.num_bags) <= self._inline.get(table, self.inline_ids):
            return _pooled(table, ids, bags, on_missing)
        return self.do(_pooled, table, ids, bags, on_missing)

    def do(self, work: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
        """Do this in a thread."""
        return asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def inline_limit(self, table: Table) -> int:
        """Most ids of this table that are looked up on the event loop."""
        return self._inline.get(table, self.inline_ids) if table.device == "cpu" else 0

    def learn(self, table: Table) -> float:
        """Time lookups of a table that is about to be served (any thread); seconds an id."""
        if not table.ids.num_ids:
            return 0.0
        rows = np.random.default_rng(0).integers(0, table.ids.num_ids, TIMED_ROWS, np.int64)
        out = np.zeros((len(rows), table.embedding_dim), np.float32)
        table.compose(rows, out)  # compiles, faults pages in
        began = time.perf_counter()
        table.compose(rows, out)
        seconds = (time.perf_counter() - began) / len(rows)
        self._inline[table] = max(16, min(self.inline_ids, int(INLINE_SECONDS / max(seconds, 1e-9))))
        if self.batcher is not None and uses_batching(self.batching, table):
            self.batched.add(table)
        return seconds

    def attach(self, table: Table, cached: CachedTable) -> None:
        """Look this table up through a cache."""
        self.cached[table] = cached

    def forget(self, table: Table) -> None:
        """This table is served no longer."""
        self._inline.pop(table, None)
        self.batched.discard(table)
        self.cached.pop(table, None)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.batcher is not None:
            self.batcher.close()


def _pooled(table: Table, ids: Ids, bags: Bags, on_missing: str) -> Fetched:
    try:
        return table.fetch_bags(ids, bags, on_missing)
    except DataError as error:
        raise Unprocessable(str(error), table=table.name) from error


async def all_of(fetched: list[Any]) -> list[Fetched]:
    """Every lookup's answer, in their order; when one fails, nobody waits for those after it."""
    done: list[Fetched] = []
    try:
        for one in fetched:
            done.append(await one if isawaitable(one) else one)  # noqa: PERF401
    finally:
        abandon(fetched[len(done) :])
    return done


def abandon(fetched: list[Any]) -> None:
    """Nobody will wait for these lookups."""
    for one in fetched:
        if isinstance(one, asyncio.Future):
            one.cancel()
        elif hasattr(one, "close"):
            one.close()
