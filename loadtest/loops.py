"""The two loops: requests that wait for replies, and requests that are due whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from loadtest.plan import LoadError, Plan, due_times
from loadtest.replies import Connection
from loadtest.report import Report

CONNECT_SECONDS = 10.0
RECONNECT_SECONDS = 0.02
LINGER_SECONDS = 5.0
SPIN_NS = 2_000_000
"""Closer than this, a due time is waited for awake: timers of the event loop are milliseconds."""
SENDS_AT_ONCE = 32
"""Then replies are read, even when the generator is behind."""


class Load:
    """What both loops share: connections that come and go, and what is counted."""

    mode = ""

    def __init__(self, plan: Plan, requests: Sequence[bytes]) -> None:
        self.plan, self.requests, self.at = plan, requests, 0
        self.report = Report(mode=self.mode, seconds=plan.seconds, connections=plan.connections, rate=plan.rate)
        self.buffer = bytearray(1 << 18)
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.since = self.until = 0
        self.running = False

    async def connect(self) -> None:
        """Open every connection; LoadError when the server cannot be reached."""
        host, port = self.plan.address
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for _ in range(self.plan.connections):
                    await self._open_one()
        except TimeoutError:
            raise LoadError(f"cannot connect to {host}:{port} in {CONNECT_SECONDS:g} s") from None
        except OSError as error:
            raise LoadError(f"cannot connect to {host}:{port}: {error.strerror or error}") from error

    async def _open_one(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: Connection(self, self.buffer), *self.plan.address)

    async def run(self) -> Report:
        """The whole measurement."""
        begin = time.perf_counter_ns()
        self.since = begin + int(self.plan.warmup * 1e9)
        self.until = self.since + int(self.plan.seconds * 1e9)
        self.running = True
        await self.drive()
        self.running = False
        return self.report

    async def drive(self) -> None:
        """Make the load until its end."""
        raise NotImplementedError

    def ready(self, connection: Connection) -> None:
        """A connection can take a request."""
        raise NotImplementedError

    def next_request(self) -> bytes:
        """The requests in turn."""
        self.at = at = self.at + 1 if self.at + 1 < len(self.requests) else 0
        return self.requests[at]

    def counts(self, due: int, now: int) -> bool:
        """Whether a request belongs to the measurement."""
        raise NotImplementedError

    def replied(self, due: int, sent: int, status: int, num_bytes: int, retry_after: bool) -> None:
        """A whole reply is there."""
        now = time.perf_counter_ns()
        if self.running and self.counts(due, now):
            report = self.report
            ok = 200 <= status < 300
            report.statuses[status] += 1
            report.num_bytes += num_bytes
            (report.latency if ok else report.refused).record(now - due)
            if ok:
                report.service.record(now - sent)
            if retry_after:
                report.retry_after += 1
            if now < self.until:
                report.in_time += 1
                report.ok_in_time += ok

    def failed(self, due: int, kind: str) -> None:
        """A request will get no reply."""
        if self.running and self.counts(due, time.perf_counter_ns()):
            self.report.errors[kind] += 1

    def made(self, connection: Connection) -> None:
        """A connection is open."""
        self.connections.add(connection)
        self.ready(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is gone; another takes its place."""
        self.connections.discard(connection)
        if self.running:
            self.report.reconnects += 1
            pause = 0.0 if connection.status else RECONNECT_SECONDS  # it never had a reply: the server wants no more
            task = asyncio.get_running_loop().create_task(self._open_again(pause))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _open_again(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            if not self.running:
                return
            try:
                return await self._open_one()
            except OSError:
                self.report.errors["connect"] += 1
                pause = RECONNECT_SECONDS

    def expire(self) -> None:
        """Fail what was sent, or has waited to be sent, too long ago, and look again a little later."""
        if self.plan.timeout is None or not self.running:
            return
        oldest = time.perf_counter_ns() - int(self.plan.timeout * 1e9)
        for connection in list(self.connections):
            if connection.due is not None and connection.sent < oldest:
                connection.fail("timeout")
        self.expire_queue(oldest)
        asyncio.get_running_loop().call_later(min(0.1, self.plan.timeout / 10), self.expire)

    def expire_queue(self, oldest: int) -> None:
        """Fail what was due before `oldest` and is not sent yet."""

    def close(self) -> None:
        """Leave no connection and no task."""
        self.running = False
        for task in self.tasks:
            task.cancel()
        for connection in list(self.connections):
            connection.close()


class ClosedLoop(Load):
    """Each connection sends when it was answered."""

    mode = "closed"

    async def drive(self) -> None:
        for connection in list(self.connections):
            self.ready(connection)
        self.expire()
        await asyncio.sleep((self.since - time.perf_counter_ns()) / 1e9)
        begin, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep((self.until - time.perf_counter_ns()) / 1e9)
        self.report.busy = (time.process_time() - cpu) / (time.perf_counter() - begin)

    def ready(self, connection: Connection) -> None:
        if self.running:
            self.report.offered += (now := time.perf_counter_ns()) >= self.since
            connection.send(now, self.next_request())

    def counts(self, due: int, now: int) -> bool:  # noqa: ARG002
        return self.since <= now < self.until


class OpenLoop(Load):
    """Requests are sent when they are due, as far as connections are free."""

    mode = "open"

    def __init__(self, plan: Plan, requests: Sequence[bytes]) -> None:
        super().__init__(plan, requests)
        self.free: deque[Connection] = deque()
        self.waiting: deque[int] = deque()

    async def drive(self) -> None:
        loop = asyncio.get_running_loop()
        self.loop, self.ended = loop, loop.create_future()
        self.schedule = due_times(self.plan, self.since - int(self.plan.warmup * 1e9), self.until)
        self.next_due = next(self.schedule, None)
        self.expire()
        self._tick()
        await self.ended
        linger = self.plan.timeout or LINGER_SECONDS
        end = time.perf_counter() + linger + 0.2
        while (left := self._unanswered()) and time.perf_counter() < end:
            await asyncio.sleep(0.005)
        if left:
            self.report.errors["unanswered"] += left

    def _unanswered(self) -> int:
        ended = self.report.statuses.total() + self.report.errors.total() - self.report.errors["connect"]
        return self.report.offered - ended

    def _tick(self) -> None:
        """Send what is due, then wait for the next: asleep while that is far, awake when it is near."""
        if self.ended.done():  # cancelled
            return
        for _ in range(SENDS_AT_ONCE):
            due = self.next_due
            if due is None:
                self.ended.set_result(None)
                return
            now = time.perf_counter_ns()
            if due > now:
                break
            if due >= self.since:
                self.report.offered += 1
                self.report.lag.record(now - due)
            self._send(due)
            self.next_due = next(self.schedule, None)
        if self.next_due is not None and (ahead := self.next_due - time.perf_counter_ns()) > SPIN_NS:
            self.loop.call_later((ahead - SPIN_NS) / 1e9, self._tick)
        else:
            self.loop.call_soon(self._tick)

    def _send(self, due: int) -> None:
        while self.free:
            connection = self.free.popleft()
            if connection.usable():
                connection.send(due, self.next_request())
                return
        self.waiting.append(due)

    def ready(self, connection: Connection) -> None:
        if self.waiting:
            due = self.waiting.popleft()
            if due >= self.since:
                self.report.queued.record(time.perf_counter_ns() - due)
            connection.send(due, self.next_request())
        else:
            self.free.append(connection)

    def counts(self, due: int, now: int) -> bool:  # noqa: ARG002
        return due >= self.since

    def expire_queue(self, oldest: int) -> None:
        while self.waiting and self.waiting[0] < oldest:
            self.failed(self.waiting.popleft(), "timeout")
