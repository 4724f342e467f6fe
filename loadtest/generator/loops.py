"""The two loops: requests that wait for replies, and requests that are due whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator

from loadtest.errors import LoadError
from loadtest.generator.interfaces import Caller, Engine, InFlight, Request, Version
from loadtest.generator.recorder import SECOND, Recorder
from loadtest.generator.timer import Timer

CONNECT_SECONDS = 10.0
CONNECTS_AT_ONCE = 32
RECONNECT_SECONDS = 0.02
LINGER_SECONDS = 5.0
"""For what is in flight at the end, where there is no timeout."""
CLOSE_SECONDS = 2.0
STOP_SECONDS = 0.5
"""For what is in flight when the run is stopped."""
BEHIND_SECONDS = 0.5
"""An open loop that is still so far behind at the end sends no more."""
SENDS_AT_ONCE = 32
"""Then replies are read, even when the generator is behind."""


class Load:
    """What both loops share: callers that come and go, and time that passes.

    timeout: seconds after which a request has failed, from its intended start (None: none, but LINGER_SECONDS).
    busy: the share of a core that the measurement took, without waiting awake; unsent: requests that were due and never
    sent, by chance arrivals about; checked: whether a reply must be the answer to its request;
    stopped: when it was stopped, in nanoseconds, None where it came to its end.
    """

    def __init__(
        self, engine: Engine, recorder: Recorder, *, connections: int, timeout: float | None, address: tuple[str, int]
    ) -> None:
        self.engine, self.recorder, self.connections, self.timeout = engine, recorder, connections, timeout
        self.address = address
        self.callers: set[Caller] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.running = False
        self.stopped: int | None = None
        self.error: BaseException | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self.busy, self.unsent, self.checked = 0.0, 0, True

    async def connect(self) -> None:
        """Open every connection; LoadError when the server cannot be reached."""
        where = f"{self.address[0]}:{self.address[1]}"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                for at in range(0, self.connections, CONNECTS_AT_ONCE):
                    num = min(CONNECTS_AT_ONCE, self.connections - at)
                    await asyncio.gather(*(self.engine.open(self) for _ in range(num)))
        except TimeoutError:
            raise LoadError(f"cannot connect to {where} in {CONNECT_SECONDS:g} s") from None
        except OSError as error:
            raise LoadError(f"cannot connect to {where}: {error.strerror or error}") from error

    async def run(self) -> None:
        """The whole measurement, and what is still in flight then; LoadError when the generator itself failed."""
        loop = asyncio.get_running_loop()
        self.running = True
        cpu: list[tuple[float, float]] = []
        ahead = (self.recorder.begin - time.perf_counter_ns()) / SECOND
        timer = loop.call_later(max(0.0, ahead), lambda: cpu.append((self.spent(), time.perf_counter())))
        self.expire()
        try:
            await self.drive()
        except Exception as error:
            self.broken(error)
        timer.cancel()
        for used, since in cpu:
            self.busy = (self.spent() - used) / max(time.perf_counter() - since, 1e-9)
        await self._linger()
        self.running = False
        if self.error is not None:
            raise LoadError(f"the generator failed: {type(self.error).__name__}: {self.error}") from self.error

    def spent(self) -> float:
        """Seconds of a core that this process has worked."""
        return time.process_time()

    async def _linger(self) -> None:
        """Wait for what is in flight; what has no reply then is `unanswered`."""
        end = time.perf_counter_ns() + int(((self.timeout or LINGER_SECONDS) + 0.2) * SECOND)
        while self._unanswered() and (now := time.perf_counter_ns()) < end:
            if self.stopped is not None and now > self.stopped + STOP_SECONDS * SECOND:
                break
            await asyncio.sleep(0.005)
        self.expire_queue(time.perf_counter_ns(), "unanswered")
        for in_flight in self._unanswered():
            self.failed(in_flight, "unanswered")

    def _unanswered(self) -> list[InFlight]:
        """Requests without a reply."""
        return [caller.in_flight for caller in self.callers if caller.in_flight is not None]

    def stop(self) -> None:
        """Send no more; `run` returns soon, whatever is in flight."""
        self.stopped = self.stopped or time.perf_counter_ns()
        self.send_no_more()

    def send_no_more(self) -> None:
        """What is in flight may still be answered."""
        if not self.ended.done():
            self.ended.set_result(None)

    def broken(self, error: BaseException) -> None:
        """End: the generator itself failed."""
        self.error = self.error or error
        self.stop()

    async def drive(self) -> None:
        """Make the load until its end."""
        raise NotImplementedError

    def ready(self, caller: Caller) -> None:
        """A caller can take a request."""
        raise NotImplementedError

    def refused(self) -> None:
        """An attempt to open a connection again failed."""
        raise NotImplementedError

    def next_request(self, now: int) -> Request:
        """What to send now."""
        return self.engine.next((now - self.recorder.begin) / SECOND)

    def replied(
        self,
        in_flight: InFlight,
        status: int,
        num_bytes: int,
        retry_after: bool,
        problem: str | None,
        version: Version | None,
    ) -> None:
        """A whole reply is there."""
        if problem and self.checked:
            self.recorder.mislabelled(in_flight.due, in_flight.request.kind, problem)
            return
        self.recorder.replied(
            in_flight.due, in_flight.sent, in_flight.done, in_flight.request.kind, status, num_bytes, retry_after
        )
        if version:
            self.recorder.version(*version, in_flight.done)

    def failed(self, in_flight: InFlight, kind: str) -> None:
        """A request will get no reply."""
        self.recorder.failed(in_flight.due, in_flight.request.kind, kind)

    def made(self, caller: Caller) -> None:
        """A connection is open."""
        self.callers.add(caller)
        self.ready(caller)

    def reconnected(self) -> None:
        """A caller opened a further connection."""
        self.recorder.reconnected(time.perf_counter_ns())

    def lost(self, caller: Caller, *, answered: bool) -> None:
        """A connection is gone; another takes its place, not at once where the server wants no more."""
        self.callers.discard(caller)
        if self.running:
            self.reconnected()
            task = asyncio.get_running_loop().create_task(self._open_again(0.0 if answered else RECONNECT_SECONDS))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _open_again(self, pause: float) -> None:
        while True:
            await asyncio.sleep(pause)
            if not self.running:
                return
            try:
                return await self.engine.open(self)
            except OSError:
                self.refused()
                pause = RECONNECT_SECONDS

    def expire(self) -> None:
        """Fail what was due too long ago, and look again a little later."""
        if self.timeout is None or not self.running:
            return
        oldest = time.perf_counter_ns() - int(self.timeout * SECOND)
        for caller in list(self.callers):
            if caller.in_flight is not None and caller.in_flight.due < oldest:
                caller.fail("timeout")
        self.expire_queue(oldest)
        asyncio.get_running_loop().call_later(min(0.1, self.timeout / 10), self.expire)

    def expire_queue(self, oldest: int, kind: str = "timeout") -> None:
        """Fail what was due before `oldest` and is not sent yet."""

    async def close(self) -> None:
        """Leave no connection and no task."""
        self.running = False
        for task in self.tasks:
            task.cancel()
        for caller in list(self.callers):
            caller.close()
        end = time.perf_counter() + CLOSE_SECONDS
        while self.callers and time.perf_counter() < end:
            await asyncio.sleep(0.001)


class ClosedLoop(Load):
    """Each caller sends when it was answered."""

    async def drive(self) -> None:
        for caller in list(self.callers):
            self.ready(caller)
        left = (self.recorder.end - time.perf_counter_ns()) / SECOND
        await asyncio.wait([self.ended], timeout=max(0.0, left))
        self.send_no_more()

    def ready(self, caller: Caller) -> None:
        if self.running and not self.ended.done():
            now = time.perf_counter_ns()
            request = self.next_request(now)
            self.recorder.offered(now, request.kind)
            caller.send(InFlight(now, request))

    def refused(self) -> None:
        """A caller that finds no server has failed, and tries again."""
        if not self.ended.done():
            now = time.perf_counter_ns()
            request = self.next_request(now)
            self.recorder.offered(now, request.kind)
            self.recorder.failed(now, request.kind, "connect")


class OpenLoop(Load):
    """Requests are sent when they are due, as far as callers are free.

    schedule: when, in nanoseconds; num_due: how many those are.
    """

    def __init__(
        self, engine: Engine, recorder: Recorder, *, connections: int, timeout: float | None, address: tuple[str, int]
    ) -> None:
        super().__init__(engine, recorder, connections=connections, timeout=timeout, address=address)
        self.schedule: Iterator[int] = iter(())
        self.num_due = self.num_sent = 0
        self.free: deque[Caller] = deque()
        self.waiting: deque[InFlight] = deque()
        self.ahead: Request | None = None

    async def drive(self) -> None:
        self.give_up = self.recorder.end + int(BEHIND_SECONDS * SECOND)
        self.next_due = next(self.schedule, None)
        self.timer = Timer(self._tick)
        try:
            self._tick()
            await self.ended
        finally:
            self.timer.close()

    def spent(self) -> float:
        return super().spent() - self.timer.spun / SECOND

    def _unanswered(self) -> list[InFlight]:
        return [*super()._unanswered(), *self.waiting]

    def _tick(self) -> None:
        """Send what is due, make the next request, and wait until that is due."""
        if self.ended.done():
            return
        now = time.perf_counter_ns()
        for _ in range(SENDS_AT_ONCE):
            due = self.next_due
            if due is None or due > now or now > self.give_up:
                break
            request = self.ahead or self.next_request(due)
            self.ahead = None
            self.num_sent += 1
            self.recorder.offered(due, request.kind)
            self.recorder.lag(due, request.kind, now - due)
            self._send(InFlight(due, request))
            self.next_due = next(self.schedule, None)
            now = time.perf_counter_ns()
        if now > self.give_up or (self.next_due is None and now >= self.recorder.end):
            self._end()
            return
        if self.next_due is None:
            self.timer.set(self.recorder.end)
            return
        if self.ahead is None:
            self.ahead = self.next_request(self.next_due)
        self.timer.set(self.next_due)

    def _end(self) -> None:
        if self.next_due is not None:
            self.unsent = max(1, self.num_due - self.num_sent)
        self.send_no_more()

    def _send(self, in_flight: InFlight) -> None:
        while self.free:
            caller = self.free.popleft()
            if caller.usable():
                caller.send(in_flight)
                return
        self.waiting.append(in_flight)

    def ready(self, caller: Caller) -> None:
        if self.timeout is not None:
            self.expire_queue(time.perf_counter_ns() - int(self.timeout * SECOND))
        if self.waiting:
            caller.send(self._unqueue())
        else:
            self.free.append(caller)

    def _unqueue(self) -> InFlight:
        """The request that waits longest for a caller waits no more."""
        in_flight = self.waiting.popleft()
        self.recorder.queued(in_flight.due, in_flight.request.kind, time.perf_counter_ns() - in_flight.due)
        return in_flight

    def refused(self) -> None:
        """Without any connection nobody waits for one."""
        while self.waiting and not self.callers:
            self.failed(self._unqueue(), "connect")

    def expire_queue(self, oldest: int, kind: str = "timeout") -> None:
        while self.waiting and self.waiting[0].due < oldest:
            self.failed(self._unqueue(), kind)
