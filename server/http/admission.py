"""Who is answered now, who waits, who is turned away: one first-in first-out queue in front of the lookups.

The event loop reads all requests that have arrived; then those that are complete are answered in a row, for at most
SLICE_SECONDS, and their replies leave in a row. So code stays in the processor's caches, the other side is woken
once and not for every reply, and between slices health checks and new requests are heard. Work that goes on elsewhere
(a thread, a device, Redis) is bounded by `max_concurrency`. When `max_queue` wait, or what waits holds too many bytes,
the next one is told to come back later (429); whose deadline passes while waiting is dropped without a lookup (504).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any, Protocol

import structlog

from embstore.errors import Overloaded
from server.metrics.recorder import Lookups

log = structlog.get_logger()
SLICE_SECONDS = 0.002
RETRY_AFTER_SECONDS = 1
OUTBOX_BYTES = 1 << 20
"""So many bytes of replies are held back at most: they shall still be in the cache when they are sent."""


class Waiting(Protocol):
    """A complete request with a way to answer it."""

    num_bytes: int

    def answer(self) -> Awaitable[None] | None:
        """Answer now; what is returned, if anything, is the rest of the work."""

    def refuse(self, error: Overloaded) -> None:
        """Answer with an error instead."""


class Line(Protocol):
    """A connection."""

    transport: asyncio.Transport

    def write(self, parts: tuple[Any, ...], num_bytes: int, lease: Any) -> None:
        """Send bytes, and give back the memory behind them."""


class Gate:
    """The queue of one event loop."""

    def __init__(self, lookups: Lookups, *, max_queue: int, max_concurrency: int, max_waiting_bytes: int) -> None:
        self._lookups = lookups
        self.max_queue, self.max_concurrency, self.max_waiting_bytes = max_queue, max_concurrency, max_waiting_bytes
        self._queue: deque[Waiting] = deque()
        self._queued_bytes = 0
        self.arriving_bytes = 0
        """Bytes of bodies that have begun to arrive and are not complete."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._outbox: list[tuple[Line, tuple[Any, ...], int, Any]] | None = None
        """Replies that leave together; None outside of a slice."""
        self._outbox_bytes = 0

    def submit(self, waiting: Waiting) -> None:
        """Queue a complete request, or refuse it."""
        queue = self._queue
        if len(queue) >= self.max_queue or not self.has_room(waiting.num_bytes):
            detail = f"{len(queue):,} requests are waiting already; try again in a moment"
            return waiting.refuse(Overloaded(detail, retry_after=RETRY_AFTER_SECONDS))
        queue.append(waiting)
        self._queued_bytes += waiting.num_bytes
        if not self._scheduled:
            self._soon()

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more bytes of requests may be held; an empty house takes any one request."""
        held = self._queued_bytes + self.arriving_bytes
        return held == 0 or held + num_bytes <= self.max_waiting_bytes

    def send(self, line: Line, parts: tuple[Any, ...], num_bytes: int, lease: Any) -> None:
        """Send a reply, with the others of this slice if there is one."""
        if self._outbox is None:
            line.write(parts, num_bytes, lease)
            return
        self._outbox.append((line, parts, num_bytes, lease))
        self._outbox_bytes += num_bytes
        if self._outbox_bytes >= OUTBOX_BYTES:
            self.flush()

    def flush(self) -> None:
        """Let the replies of this slice leave."""
        if self._outbox:
            replies, self._outbox, self._outbox_bytes = self._outbox, [], 0
            for line, parts, num_bytes, lease in replies:
                try:
                    line.write(parts, num_bytes, lease)
                except Exception:  # one connection's trouble is not the others'
                    log.exception("a reply could not be sent")
                    line.transport.abort()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._queue and not self._scheduled:
            self._soon()

    def _soon(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        """Answer what waits, for one slice."""
        queue, tasks, clock = self._queue, self._tasks, time.perf_counter
        self._outbox = []
        ends = clock() + SLICE_SECONDS
        try:
            while queue and len(tasks) < self.max_concurrency:
                waiting = queue.popleft()
                self._queued_bytes -= waiting.num_bytes
                rest = waiting.answer()
                if rest is not None:
                    task = asyncio.ensure_future(rest)
                    tasks.add(task)
                    task.add_done_callback(self._done)
                if clock() > ends:
                    break
        finally:
            self._scheduled = False
            self.flush()
            self._outbox = None
            self._lookups.queue_depth[0] = len(queue)
            if queue and len(tasks) < self.max_concurrency:
                self._soon()
