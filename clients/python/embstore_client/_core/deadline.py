"""One time budget for a whole call, spent attempt by attempt and phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import httpx

from embstore_client._errors import EmbstoreError

_PHASES = ("connect", "read", "write", "pool")
_SHORTEST_WAIT_S = 0.001  # a socket timeout of 0 would mean "do not block", which is another error


class GivenUp(Exception):
    """An attempt ended through no doing of its address; the call raises `error`."""

    def __init__(self, error: EmbstoreError) -> None:
        super().__init__(str(error))
        self.error = error


class Abortable(Protocol):
    """A connection that another thread can wake up and end."""

    def abort(self, timeouts: AttemptTimeouts) -> None: ...


class Deadline:
    """When a call must have ended, whatever it takes."""

    __slots__ = ("clock", "end", "timeout_s")

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout_s = timeout_s
        self.clock = clock
        self.end = clock() + timeout_s

    def left(self) -> float:
        """Seconds that remain; 0 or less once the budget is spent."""
        return self.end - self.clock()


class AttemptTimeouts(Mapping[str, float]):
    """What httpx takes as the four timeouts of one attempt, each being whatever is left of the whole call.

    httpx asks this mapping at the start of every phase (pool, connect, write, read), so a slow connect leaves
    less time to read. Within a phase, `DeadlineStream` asks again at every read and write; with any other transport
    `check` is called between the chunks of a body, so a server that trickles its answer is noticed at the next chunk.

    Attributes:
        timeout_s: what was left when the attempt began.
        cancelled: nobody waits for this attempt any more: every further phase fails at once.
        queues: it waits for one of the client's own connections, so nothing is asked of the server yet.
    """

    __slots__ = ("_connect_share", "_connection", "_deadline", "cancelled", "queues", "timeout_s")

    def __init__(self, deadline: Deadline, connect_share: float = 1.0) -> None:
        self._deadline = deadline
        self._connect_share = connect_share
        self._connection: Abortable | None = None
        self.timeout_s = max(deadline.left(), 0.0)
        self.cancelled = self.queues = False

    def left(self) -> float:
        """Seconds that a phase may take from now on."""
        return _SHORTEST_WAIT_S if self.cancelled else max(self._deadline.left(), _SHORTEST_WAIT_S)

    def check(self) -> None:
        """Raise httpx's own timeout once the budget is spent."""
        if self.cancelled or self._deadline.left() < 0:
            raise httpx.ReadTimeout("the answer was not whole in time")

    def attach(self, connection: Abortable) -> None:
        """The connection that carries the attempt: what `cancel` ends."""
        self._connection = connection
        if self.cancelled:
            connection.abort(self)

    def cancel(self) -> None:
        """End the attempt from another thread, and with it the connection that it is on."""
        self.cancelled = True
        if self._connection is not None:
            self._connection.abort(self)

    def __getitem__(self, phase: str) -> float:
        if phase not in _PHASES:
            raise KeyError(phase)
        self.queues = phase == "pool"
        seconds = self.left()
        return PhaseTimeout(
            seconds * self._connect_share if phase == "connect" else seconds, self, self._deadline.clock
        )

    def __iter__(self) -> Iterator[str]:
        return iter(_PHASES)

    def __len__(self) -> int:
        return len(_PHASES)


class PhaseTimeout(float):
    """A timeout for any transport, which says to `DeadlineStream` which attempt it is of and when its phase ends."""

    __slots__ = ("_clock", "_end", "timeouts")

    _clock: Callable[[], float]
    _end: float
    timeouts: AttemptTimeouts

    def __new__(cls, seconds: float, timeouts: AttemptTimeouts, clock: Callable[[], float]) -> PhaseTimeout:
        self = super().__new__(cls, seconds)
        self.timeouts, self._clock, self._end = timeouts, clock, clock() + seconds
        return self

    def left(self) -> float:
        """What remains of the phase; 0 or less once it is over, or the attempt cancelled."""
        return 0.0 if self.timeouts.cancelled else self._end - self._clock()
