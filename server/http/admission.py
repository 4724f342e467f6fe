"""Admission: which requests are answered now, which wait, which are refused. One FIFO queue in front of the lookups.

The event loop reads all requests that have arrived; then those that are complete are answered in a row, for at most
SLICE_SECONDS, and their replies leave in a row (`server.http.outbox`). Between slices health checks and new requests
are heard. Work that goes on elsewhere (a thread, a device, Redis) is bounded by `max_concurrency`. When
`max_queued_requests` wait, or what waits holds too many bytes, the next one gets 429; one whose deadline passes while
it waits is dropped without a lookup (504).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from time import perf_counter
from typing import Protocol

from embstore.errors import Overloaded
from server.http.outbox import Outbox
from server.metrics.recorder import Lookups

SLICE_SECONDS = 0.002
RETRY_AFTER_SECONDS = 1


class Waiting(Protocol):
    """A complete request with a way to answer it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its body."""

    def answer(self) -> Awaitable[None] | None:
        """Answer now; what is returned, if anything, is the rest of the work."""

    def refuse(self, error: Overloaded) -> None:
        """Answer with an error instead."""


class Admission:
    """The queue of one event loop."""

    def __init__(
        self,
        lookups: Lookups,
        outbox: Outbox,
        *,
        max_queued_requests: int,
        max_concurrency: int,
        max_waiting_bytes: int,
    ) -> None:
        self._lookups, self._outbox = lookups, outbox
        self.max_queued_requests, self.max_concurrency, self.max_waiting_bytes = (
            max_queued_requests,
            max_concurrency,
            max_waiting_bytes,
        )
        self._queue: deque[Waiting] = deque()
        self._queued_bytes = 0
        self.arriving_bytes = 0
        """Bytes of bodies that have begun to arrive and are not complete."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._turn = self._slice_began = 0.0

    def admits_at_once(self, began: float, turn: float, num_bytes: int) -> bool:
        """Whether a complete request may be answered without the queue: nothing waits, and the slice is not over.

        began: `perf_counter()`; turn: the event loop's time, which uvloop reads once a turn. Requests that come one at
        a time never queue; of those that a busy event loop finds waiting together, what does not fit into a slice goes
        the general way, which lets others be heard in between.
        """
        if self._queue or len(self._tasks) >= self.max_concurrency or not self.has_room(num_bytes):
            return False
        if turn != self._turn:
            self._turn, self._slice_began = turn, began
        return began - self._slice_began < SLICE_SECONDS

    def submit(self, waiting: Waiting) -> None:
        """Queue a complete request, or refuse it."""
        queue = self._queue
        if len(queue) >= self.max_queued_requests:
            detail = f"{len(queue):,} requests are queued (max_queued_requests); retry later"
            return waiting.refuse(Overloaded(detail, retry_after=RETRY_AFTER_SECONDS))
        if not self.has_room(waiting.num_bytes):
            detail = "request memory limit reached (max_waiting_bytes); retry later"
            return waiting.refuse(Overloaded(detail, retry_after=RETRY_AFTER_SECONDS))
        queue.append(waiting)
        self._queued_bytes += waiting.num_bytes
        if not self._scheduled:
            self._soon()

    def has_room(self, num_bytes: int) -> bool:
        """Whether this many more bytes of requests may be held; when nothing is held, any single request is."""
        held = self._queued_bytes + self.arriving_bytes
        return held == 0 or held + num_bytes <= self.max_waiting_bytes

    def run(self, rest: Awaitable[None]) -> None:
        """Work that goes on elsewhere: it counts towards `max_concurrency` until it ends."""
        task = asyncio.ensure_future(rest)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._queue and not self._scheduled:
            self._soon()

    def _soon(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        """Answer what waits, for one slice."""
        queue = self._queue
        self._outbox.open()
        ends = perf_counter() + SLICE_SECONDS
        try:
            while queue and len(self._tasks) < self.max_concurrency:
                waiting = queue.popleft()
                self._queued_bytes -= waiting.num_bytes
                rest = waiting.answer()
                if rest is not None:
                    self.run(rest)
                if perf_counter() > ends:
                    break
        finally:
            self._scheduled = False
            self._outbox.close()
            self._lookups.queue_depth[0] = len(queue)
            if queue and len(self._tasks) < self.max_concurrency:
                self._soon()
