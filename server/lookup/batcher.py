"""Dynamic batching: one thread owns the device, and what is queued when the device is free goes into one launch.

Where starting a launch costs more than the ids in it, requests that arrive while one is running better wait for its end
and go together; `uses_batching` finds out. No request waits for others unless `max_delay_s` says so: an idle device
takes a request at once.

    event loop                                   device thread
    fetch: ids to rows, range checked     ->     all that wait for one version, up to max_ids ids
    futures of the whole batch            <-     one launch, vectors handed out to each request

Versions take turns in the order in which their oldest request came; one with more than a launch holds goes to the end
of the queue. A request that was cancelled before its launch is left out of it. One that fails does so alone where its
ids are at fault, because they are checked before it waits; a launch that fails, fails for all that were in it, and is
not tried again: what breaks a launch is the device.

When the device has failed (`problem`), requests are refused at once, readiness answers 503, and the process has to be
restarted by whatever supervises it: a CUDA context that has failed does not come back.
"""

# Shapes: B ids of a request, S ids of a batch of requests, D embedding_dim.

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import structlog

from embstore.device import Part, device_named, hand_out
from embstore.errors import DeviceFailed, Draining, NotReady, Overloaded
from embstore.ids import Ids
from embstore.table import Fetched, Floats, Resolved, Table

log = structlog.get_logger()

WAITING_IDS = 1 << 20
"""Ids that may wait together, whatever the number of requests: their vectors already have memory."""
STUCK_SECONDS = 30.0
"""A launch that takes longer than this means that the device hangs."""
CLOSE_SECONDS = 5.0
PROBE_IDS, PROBE_ROUNDS = 1_000, 15
PAYS = 0.9
"""Batching pays when one launch for two requests takes less than this share of the time of two."""


class Launches(Protocol):
    """Where launches are counted; called on the event loop."""

    def count_batch(self, num_requests: int, num_ids: int) -> None:
        """One launch of so many requests with so many ids."""


@dataclass(slots=True, eq=False)
class _Waiter:
    resolved: Resolved
    vectors_BD: Floats
    future: asyncio.Future[Fetched]
    since: float

    @property
    def num_ids(self) -> int:
        return len(self.resolved.rows_B)


class _Queue:
    """Requests for one version, the oldest first."""

    __slots__ = ("num_ids", "waiters")

    def __init__(self) -> None:
        self.waiters: deque[_Waiter] = deque()
        self.num_ids = 0

    def add(self, waiter: _Waiter) -> None:
        self.waiters.append(waiter)
        self.num_ids += waiter.num_ids

    def take(self, max_ids: int) -> list[_Waiter]:
        """The oldest requests, as many as `max_ids` ids hold, but at least one; cancelled ones are dropped."""
        taken: list[_Waiter] = []
        num_ids = 0
        while self.waiters:
            waiter = self.waiters[0]
            gone = waiter.future.done()
            if taken and not gone and num_ids + waiter.num_ids > max_ids:
                break
            self.waiters.popleft()
            self.num_ids -= waiter.num_ids
            if not gone:
                num_ids += waiter.num_ids
                taken.append(waiter)
        return taken

    def drop_cancelled(self) -> None:
        self.waiters = deque(waiter for waiter in self.waiters if not waiter.future.done())
        self.num_ids = sum(waiter.num_ids for waiter in self.waiters)


class DynamicBatcher:
    """Looks ids up on a thread of its own, several requests at a time; made once a process, after it forked.

    max_delay_s: how long a request may wait for others on an idle device. max_ids: ids of a launch, unless one request
    has more. max_pending: requests that may wait. stuck_s: how long a launch may take before `problem` says it hangs.
    """

    def __init__(
        self,
        *,
        max_delay_s: float = 0.0,
        max_ids: int = 65_536,
        max_pending: int = 1024,
        lookups: Launches | None = None,
        stuck_s: float = STUCK_SECONDS,
    ) -> None:
        self.max_delay_s, self.max_ids, self.max_pending, self.stuck_s = max_delay_s, max_ids, max_pending, stuck_s
        self.lookups = lookups
        self._queues: OrderedDict[Table, _Queue] = OrderedDict()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failed: str | None = None
        self._launched: float | None = None
        self._closed = False

    @property
    def problem(self) -> str | None:
        """Why lookups are refused, None while all is well; a device that failed stays so, one that hangs may not."""
        launched = self._launched
        if self._failed is None and launched is not None and time.monotonic() - launched > self.stuck_s:
            return f"a launch has been running for more than {self.stuck_s:g} s"
        return self._failed

    def fetch(self, table: Table, ids: Ids, on_missing: str, out: Floats | None = None) -> asyncio.Future[Fetched]:
        """What `table.fetch` gives, later; called on the event loop, raises at once what is wrong with the ids.

        Overloaded when too many are waiting, NotReady when the device has failed. `out` is the device thread's until
        the future is done, and after a cancellation until the launch under way has ended: use it for nothing else then.
        """
        self._admit(table, len(ids))
        vectors_BD = np.empty((len(ids), table.embedding_dim), np.float32) if out is None else out
        resolved = table.resolve(ids, on_missing, vectors_BD)
        future: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        if resolved.missing == len(resolved.rows_B) and not (resolved.rows_B >= 0).any():
            future.set_result(Fetched(vectors_BD, resolved.found_B, resolved.missing))
            return future
        waiter = _Waiter(resolved, vectors_BD, future, time.monotonic())
        with self._changed:
            if self._closed:
                raise _draining()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="device", daemon=True)
                self._thread.start()
            queue = self._queues.get(table)
            if queue is None:
                queue = self._queues[table] = _Queue()
            queue.add(waiter)
            self._changed.notify()
        return future

    def close(self) -> None:
        """End the thread once its launch is done; what is waiting gets Draining."""
        with self._changed:
            self._closed = True
            left = [waiter for queue in self._queues.values() for waiter in queue.waiters]
            self._queues.clear()
            self._changed.notify_all()
        self._settle(left, _draining())
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _admit(self, table: Table, num_ids: int) -> None:
        """Refuse a request before anything is done for it."""
        if self._closed:
            raise _draining()
        if self._failed is not None:
            raise DeviceFailed(self._failed, table=table.name, version=table.version)
        if (problem := self.problem) is not None:
            raise NotReady(f"the device hangs: {problem}", table=table.name, version=table.version)
        with self._changed:
            if self._is_full(num_ids):
                for queue in self._queues.values():
                    queue.drop_cancelled()
                if self._is_full(num_ids):
                    raise Overloaded(
                        f"{self._num_waiting():,} lookups are waiting for the device already; try again later",
                        table=table.name,
                        limit=self.max_pending,
                    )

    def _is_full(self, num_ids: int) -> bool:
        waiting_ids = sum(queue.num_ids for queue in self._queues.values())
        return self._num_waiting() >= self.max_pending or (waiting_ids > 0 and waiting_ids + num_ids > WAITING_IDS)

    def _num_waiting(self) -> int:
        return sum(len(queue.waiters) for queue in self._queues.values())

    def _work(self) -> None:
        while self._work_once():  # a call each, so that no variable keeps a version alive while there is no work
            pass

    def _work_once(self) -> bool:
        """Wait for requests and answer a batch of them; False when there will be no more."""
        with self._changed:
            while not self._closed and (wait_s := self._idle_s()) != 0:
                self._changed.wait(wait_s)
            if self._closed:
                return False
            table, queue = next(iter(self._queues.items()))
            waiters = queue.take(self.max_ids)
            if queue.waiters:
                self._queues.move_to_end(table)
            else:
                del self._queues[table]
        if waiters:
            self._settle(waiters, self._launch(table, waiters))
        return True

    def _idle_s(self) -> float | None:
        """How long there is nothing to do: None while nobody waits, 0 when a batch is to be launched."""
        if not self._queues:
            return None
        queue = next(iter(self._queues.values()))
        if not self.max_delay_s or not queue.waiters or queue.num_ids >= self.max_ids:
            return 0.0
        return max(0.0, queue.waiters[0].since + self.max_delay_s - time.monotonic())

    def _launch(self, table: Table, waiters: list[_Waiter]) -> Exception | None:
        """Compose the vectors of all; the error that all of them get, if any."""
        self._launched = time.monotonic()
        try:
            compose_batch(table, [(waiter.resolved.rows_B, waiter.vectors_BD) for waiter in waiters])
            return None
        except DeviceFailed as error:
            self._failed = str(error)
            return error
        except Exception as error:
            log.error("launch failed", table=table.name, version=table.version, requests=len(waiters), exc_info=error)
            return error
        finally:
            self._launched = None

    def _settle(self, waiters: Sequence[_Waiter], error: Exception | None) -> None:
        """Hand a batch over to the event loop, in one call for all."""
        by_loop: dict[asyncio.AbstractEventLoop, list[_Waiter]] = {}
        for waiter in waiters:
            by_loop.setdefault(waiter.future.get_loop(), []).append(waiter)
        for loop, some in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._deliver, some, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                log.debug("lookups outlived their event loop", requests=len(some))

    def _deliver(self, waiters: Sequence[_Waiter], error: Exception | None) -> None:
        """On the event loop: every waiter that is still there gets what it waits for."""
        for waiter in waiters:
            if waiter.future.done():
                continue
            if error is None:
                waiter.future.set_result(Fetched(waiter.vectors_BD, waiter.resolved.found_B, waiter.resolved.missing))
            else:
                waiter.future.set_exception(error)
        if error is None and self.lookups is not None:
            self.lookups.count_batch(len(waiters), sum(waiter.num_ids for waiter in waiters))


def compose_batch(table: Table, parts: Sequence[Part]) -> None:
    """Vectors of several requests' rows in one launch, or in one call of the loop on a CPU."""
    if table.device != "cpu":
        lookup = partial(table.scheme.lookup, table.config, table.tensors)
        device_named(table.device).compose(lookup, parts)
    elif len(parts) == 1:
        table.compose(*parts[0])
    else:
        rows_S = np.concatenate([rows_B for rows_B, _ in parts])
        vectors_SD = np.empty((len(rows_S), table.embedding_dim), np.float32)
        table.compose(rows_S, vectors_SD)
        hand_out(vectors_SD, parts)


def uses_batching(setting: str, table: Table) -> bool:
    """Whether a table's lookups are batched: on, off, or auto, which measures on a GPU and is off on a CPU.

    Called while a version is loaded, before anything is asked of it.
    """
    return setting == "on" or (setting == "auto" and table.device != "cpu" and batching_pays(table))


def batching_pays(table: Table, seconds: Callable[[list[Part]], float] | None = None) -> bool:
    """Whether one launch for two requests of 1,000 ids is clearly faster than two launches, here and now.

    seconds: how long a launch for these parts takes; by default it is tried. Medians of rounds that take turns, so that
    what else the machine does hits both alike.
    """
    seconds = seconds or partial(_timed, table)
    rows_B = np.random.default_rng(0).integers(0, max(1, table.ids.num_ids), PROBE_IDS)
    one, other = ((rows_B, np.empty((PROBE_IDS, table.embedding_dim), np.float32)) for _ in range(2))
    together, apart = [], []
    for _ in range(1 + PROBE_ROUNDS):
        together.append(seconds([one, other]))
        apart.append(seconds([one]) + seconds([other]))
    return statistics.median(together[1:]) < PAYS * statistics.median(apart[1:])  # the first round warms up


def _timed(table: Table, parts: list[Part]) -> float:
    begin = time.perf_counter()
    compose_batch(table, parts)
    return time.perf_counter() - begin


def _draining() -> Draining:
    return Draining("the server is shutting down and takes no more lookups")
