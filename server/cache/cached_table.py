"""One version of a table with its caches in front: its vectors to the last bit, from a cache where that is faster.

Three ways, and `server.cache.policy` chooses: compute; take from the tier in this process and compute the rest; ask
Redis for that rest first. What takes long is awaited: Redis, and misses that are computed in a thread. Missing ids are
never cached: what is cached is a version's rows.
"""

# Shapes: B ids in a request, M rows that the tier does not have, K rows tried at load, D embedding_dim.

from __future__ import annotations

import math
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import numpy as np
import structlog
from numpy.typing import NDArray

from embstore.errors import ConfigError
from embstore.ids import Ids
from embstore.table import Fetched, Floats, Resolved, Table
from server.cache.hot_rows import HotRows
from server.cache.policy import BATCH_SIZES, COMPUTE, LOCAL, REDIS, CachePolicy
from server.cache.redis_cache import RedisCache
from server.metrics.families import BATCHES
from server.metrics.recorder import Lookups

log = structlog.get_logger()
Rows = NDArray[np.int64]
Compute = Callable[[Table, Ids, str, Floats | None], Fetched | Awaitable[Fetched]]
"""A lookup by a table alone: at once, or awaitable where it would take long."""
InThread = Callable[..., Awaitable[Any]]
"""Calls a function with arguments in a thread."""
UNIQUE_SECONDS = 100e-9
"""Finding the different ones among rows costs about half of this for each; it is done where computing costs more."""
MIN_UNIQUE = 16
WARM_ROWS = 4096
"""Rows computed at once when a tier is filled: other threads want their turn."""
PROBE_SECONDS, FLOAT_SECONDS = 15e-9, 0.2e-9
"""A hit takes no less than this, and this for each float of its vector: about what a row of a plain table takes."""
AGAIN_SECONDS = 60.0
TRY_SECONDS = 0.002
"""For about so long each way is timed at load, for each size of batch."""


class _Misses(NamedTuple):
    """What the tier did not have of one lookup: `missed` places of the reply, filled from `rows_M`."""

    tier: HotRows
    resolved: Resolved
    missed: Rows
    vectors_BD: Floats
    rows_M: Rows
    inverse: Rows | None
    """Which of `rows_M` each place is; None: the rows are one for each place."""

    def fill(self, found_MD: Floats) -> Fetched:
        """The whole lookup, and a tier that knows more, by the vectors of `rows_M`."""
        self.tier.put(self.rows_M, found_MD)
        self.vectors_BD[self.missed] = found_MD if self.inverse is None else found_MD[self.inverse]
        return Fetched(self.vectors_BD, self.resolved.found_B, self.resolved.missing)


def _weakly(method: Callable[[str, str], None]) -> Callable[[str, str], None]:
    """The method without a hold on its object: in a cycle a table that is served no longer would keep its memory."""
    reference = WeakMethod(method)

    def call(batch: str, choice: str) -> None:
        if (found := reference()) is not None:
            found(batch, choice)

    return call


class CachedTable:
    """A table to fetch from. The loader makes it, `warm`s it and swaps it in; then the event loop fetches."""

    def __init__(
        self,
        table: Table,
        *,
        mode: str,
        tier_bytes: int,
        redis: RedisCache | None,
        lookups: Lookups,
        compute: Compute,
        in_thread: InThread,
        inline_ids: int,
        inline_misses: int,
    ) -> None:
        """inline_ids, inline_misses: the most ids looked up, and rows computed, without a thread."""
        self.table, self._compute, self._in_thread = table, compute, in_thread
        self._inline_ids, self._inline_misses = inline_ids, inline_misses
        self._redis, self._lookups, self._tier_bytes = redis, lookups, tier_bytes
        self._off = mode == "off"
        self._tier: HotRows | None = None
        self._ready = self._making = False
        self._make_at = 0.0
        lookups.add_table(table.name)
        self.policy = CachePolicy(mode, redis=redis is not None, changed=_weakly(self._chosen))
        if not self._off:
            self._measure()
            self._fit_tier()
            self._ready = True

    @property
    def tier(self) -> HotRows | None:
        """The tier in this process; None while no lookup uses one, and then it takes no memory."""
        return self._tier

    def fetch(self, ids: Ids, on_missing: str = "zero", out: Floats | None = None) -> Fetched | Awaitable[Fetched]:
        """What `table.fetch` says. Awaitable when Redis is asked, or when computing would take long."""
        policy = self.policy
        num_ids = len(ids)
        choice, timed = (COMPUTE, False) if self._off else policy.choose(num_ids)
        if choice == COMPUTE:
            if not timed:
                return self._compute(self.table, ids, on_missing, out)
            began = time.perf_counter()
            fetched = self._compute(self.table, ids, on_missing, out)
            if type(fetched) is Fetched:
                policy.observe(COMPUTE, num_ids, time.perf_counter() - began)
            return fetched
        tier = self._tier or self._fit_tier()
        if tier is None:
            return self._compute(self.table, ids, on_missing, out)
        vectors_BD = np.empty((num_ids, self.table.embedding_dim), np.float32) if out is None else out
        if num_ids > self._inline_ids:
            return self._in_thread(self._whole, tier, ids, on_missing, vectors_BD)
        return self._through_tier(tier, choice, timed, ids, on_missing, vectors_BD)

    def warm(self, before: CachedTable | None) -> None:
        """Fill the tier: the publisher's hot ids, then what was hottest in the version before, computed on this one."""
        tier, table = self._tier, self.table
        if tier is None:
            return
        rows = [_present(table, table.manifest.hot_ids if table.manifest is not None else [])]
        if before is not None and before.tier is not None:
            hottest = before.tier.hottest(tier.num_rows)
            if before.table.ids.id_type is table.ids.id_type:
                rows.append(_present(table, before.table.ids.ids_of(hottest)))
        every = np.concatenate(rows)
        _, first = np.unique(every, return_index=True)
        wanted = every[np.sort(first)][: tier.num_rows]
        began = time.perf_counter()
        for start in range(0, len(wanted), WARM_ROWS):
            part = np.ascontiguousarray(wanted[start : start + WARM_ROWS])
            tier.put(part, _computed(table, part))
        if len(wanted):
            seconds = round(time.perf_counter() - began, 3)
            log.info("cache warmed", table=table.name, version=table.version, num_rows=len(wanted), seconds=seconds)

    def describe(self) -> dict[str, Any]:
        """What is chosen and measured, and the memory the tier takes."""
        tier = self._tier
        return self.policy.describe() | {
            "tier_rows": tier.num_rows if tier else 0,
            "tier_bytes": tier.num_bytes if tier else 0,
        }

    def _through_tier(
        self, tier: HotRows, choice: str, timed: bool, ids: Ids, on_missing: str, vectors_BD: Floats
    ) -> Fetched | Awaitable[Fetched]:
        began = time.perf_counter()
        table = self.table
        resolved, missed, num_hits = self._take(tier, ids, on_missing, vectors_BD)
        if len(missed):
            misses = self._misses(tier, resolved, missed, vectors_BD)
            rows_M = misses.rows_M
            if choice == REDIS and self._redis is not None and self._redis.available():
                return self._through_redis(misses, timed)
            if len(rows_M) > self._inline_misses:
                return self._later(misses, began if timed else None, num_hits)
            computed = _computed(table, rows_M)
            misses.fill(computed)
            if choice == REDIS and self._redis is not None:
                self._redis.put_soon(table, rows_M, computed)
        if timed and choice != REDIS:
            self.policy.observe(choice, len(ids), time.perf_counter() - began, num_hits)
        return Fetched(vectors_BD, resolved.found_B, resolved.missing)

    async def _later(self, misses: _Misses, began: float | None, num_hits: int) -> Fetched:
        """The misses are many, or dear: computed in a thread while the event loop goes on."""
        fetched = misses.fill(await self._in_thread(_computed, self.table, misses.rows_M))
        if began is not None:
            self.policy.observe(LOCAL, len(misses.vectors_BD), time.perf_counter() - began, num_hits)
        return fetched

    async def _through_redis(self, misses: _Misses, timed: bool) -> Fetched:
        assert self._redis is not None
        table, redis, rows_M = self.table, self._redis, misses.rows_M
        found_MD = np.empty((len(rows_M), table.embedding_dim), np.float32)
        began = time.perf_counter()
        hits_M = await redis.get(table, rows_M, found_MD)
        num_hits = int(np.count_nonzero(hits_M))
        if timed:
            seconds = time.perf_counter() - began
            self.policy.observe(REDIS, len(misses.vectors_BD), seconds, num_hits, asked=len(rows_M))
        if num_hits < len(rows_M):
            rest = np.flatnonzero(~hits_M)
            rows = rows_M[rest]
            if len(rows) > self._inline_misses:
                computed = await self._in_thread(_computed, table, rows)
            else:
                computed = _computed(table, rows)
            found_MD[rest] = computed
            redis.put_soon(table, rows, computed)
        return misses.fill(found_MD)

    def _whole(self, tier: HotRows, ids: Ids, on_missing: str, vectors_BD: Floats) -> Fetched:
        """A very large lookup, in a thread of its own; Redis is not asked for thousands of rows."""
        resolved, missed, _ = self._take(tier, ids, on_missing, vectors_BD)
        if len(missed):
            misses = self._misses(tier, resolved, missed, vectors_BD)
            misses.fill(_computed(self.table, misses.rows_M))
        return Fetched(vectors_BD, resolved.found_B, resolved.missing)

    def _take(self, tier: HotRows, ids: Ids, on_missing: str, vectors_BD: Floats) -> tuple[Resolved, Rows, int]:
        """Fill what the tier has; where the rest is, and how many it had."""
        resolved = self.table.resolve(ids, on_missing, vectors_BD)
        missed = tier.take(resolved.rows_B, vectors_BD)
        num_hits = len(ids) - len(missed) - (0 if on_missing == "hash" else resolved.missing)
        if num_hits:
            self._lookups.cache_count(self.table.name, "local", "hit", num_hits)
        if len(missed):
            self._lookups.cache_count(self.table.name, "local", "miss", len(missed))
        return resolved, missed, num_hits

    def _misses(self, tier: HotRows, resolved: Resolved, missed: Rows, vectors_BD: Floats) -> _Misses:
        """What is to be computed: each row once where that saves time."""
        rows_B = resolved.rows_B
        rows_M, inverse = rows_B if len(missed) == len(rows_B) else rows_B[missed], None
        if len(missed) >= MIN_UNIQUE and self.policy.expected(len(missed)) > len(missed) * UNIQUE_SECONDS:
            rows_M, inverse = np.unique(rows_M, return_inverse=True)
        return _Misses(tier, resolved, missed, vectors_BD, rows_M, inverse)

    def _chosen(self, batch: str, choice: str) -> None:
        """The policy has changed its mind: show it, and take or give back the tier's memory."""
        self._lookups.set_cache_choice(self.table.name, batch, choice)
        if self._ready:
            self._fit_tier()

    def _fit_tier(self) -> HotRows | None:
        """A tier exactly while some lookups use it; made in a thread once lookups have begun, and None until then."""
        if not self.policy.uses_tier():
            self._tier = None
        elif self._tier is None and not self._making and time.monotonic() >= self._make_at:
            self._making = True
            if self._ready:
                threading.Thread(target=self._make_tier, name="cache", daemon=True).start()
            else:
                self._make_tier()
        return self._tier

    def _make_tier(self) -> None:
        """A tier, as large as it may be or as the table needs; where there is no room for one, none for a while."""
        try:
            tier = HotRows(self.table.embedding_dim, min(self._tier_bytes, self._room(self.table.ids.num_ids)))
            self._tier = tier if self.policy.uses_tier() else None
        except (MemoryError, ConfigError) as error:
            self._make_at = time.monotonic() + AGAIN_SECONDS
            log.warning(
                "row cache disabled: allocation failed",
                table=self.table.name,
                num_bytes=self._tier_bytes,
                error=str(error),
            )
        finally:
            self._making = False

    def _room(self, num_rows: int) -> int:
        """Bytes of a tier that has a place for each of so many rows, however they fall into its sets."""
        return 8192 + (4 * num_rows + 64) * (4 * self.table.embedding_dim + 16)

    def _measure(self) -> None:
        """Time lookups that compute and lookups that find everything in a tier, of the same ids, by size of batch."""
        table, rows_K = self.table, _tried_rows(self.table)
        most = BATCH_SIZES[-1]
        (whole_s,) = _best_seconds(partial(table.fetch, self._tried_ids(rows_K, most)))
        floor_s = PROBE_SECONDS + FLOAT_SECONDS * table.embedding_dim
        tier = None
        if whole_s > most * floor_s:  # else no tier can be faster: none is compiled to see it, and none is ever tried
            tier, hit_K = self._tried_tier(rows_K)
            rows_K, tier = (hit_K, tier) if len(hit_K) else (rows_K, None)
        for batch, size in zip(BATCHES, BATCH_SIZES, strict=True):
            if tier is None:
                (compute_s,) = _best_seconds(partial(table.fetch, self._tried_ids(rows_K, size)))
                hit_s = math.inf
            else:
                ids = self._tried_ids(rows_K, size)
                compute_s, hit_s = _best_seconds(partial(table.fetch, ids), partial(_all_hits, table, tier, ids))
            self.policy.measured(batch, compute_s, hit_s)

    def _tried_tier(self, rows_K: Rows) -> tuple[HotRows, Rows]:
        """A small tier that holds these rows, and which of them it has."""
        tier = HotRows(self.table.embedding_dim, self._room(len(rows_K)))
        tier.put(rows_K, _computed(self.table, rows_K))
        hits = np.ones(len(rows_K), np.bool_)
        hits[tier.take(rows_K, np.empty((len(rows_K), self.table.embedding_dim), np.float32))] = False
        return tier, rows_K[hits]

    def _tried_ids(self, rows_K: Rows, size: int) -> Ids:
        listed = self.table.ids.ids_of(np.resize(rows_K, size))
        return np.array(listed, np.int64) if self.table.ids.id_type is int else listed


def _all_hits(table: Table, tier: HotRows, ids: Ids) -> None:
    """A lookup without misses, but for its counters."""
    vectors_BD = np.empty((len(ids), table.embedding_dim), np.float32)
    resolved = table.resolve(ids, "zero", vectors_BD)
    tier.take(resolved.rows_B, vectors_BD)
    Fetched(vectors_BD, resolved.found_B, resolved.missing)


def _computed(table: Table, rows_M: Rows) -> Floats:
    """The table's vectors of rows that are there."""
    vectors_MD = np.empty((len(rows_M), table.embedding_dim), np.float32)
    table.compose(rows_M, vectors_MD)
    return vectors_MD


def _present(table: Table, ids: Ids) -> Rows:
    """Rows of those ids that the table has."""
    rows, _ = table.ids.rows(ids)
    return rows[rows >= 0]


def _tried_rows(table: Table) -> Rows:
    """The rows that will be asked for most, where the publisher says so, or some from everywhere."""
    hot = _present(table, table.manifest.hot_ids if table.manifest is not None else [])[: BATCH_SIZES[-1]]
    if not len(hot):
        num_rows = min(table.ids.num_ids, BATCH_SIZES[-1])
        hot = np.arange(num_rows, dtype=np.int64) * (table.ids.num_ids // num_rows)
    return np.unique(hot)


def _best_seconds(*ways: Callable[[], object]) -> list[float]:
    """The least time of a few runs of each, in turns: a busy machine is busy for all of them."""
    best = [float("inf")] * len(ways)
    end = time.perf_counter() + len(ways) * TRY_SECONDS
    for number in range(500):
        for way, work in enumerate(ways):
            began = time.perf_counter()
            work()
            best[way] = min(best[way], time.perf_counter() - began)
        if number >= 4 and time.perf_counter() > end:
            break
    return best
