"""What loops and engines say to each other: a request on its way, and who carries it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from loadtest.workload.response_check import ResponseCheck

Version = tuple[str, str]
"""Table and version that a reply came from."""


class Request(NamedTuple):
    """A request as its engine sends it; `expect` checks the reply."""

    payload: Any
    kind: str = ""
    expect: ResponseCheck | None = None


@dataclass(slots=True)
class InFlight:
    """A request that was due, when it was sent and when its reply was there whole; nanoseconds of perf_counter_ns."""

    due: int
    request: Request
    sent: int = 0
    done: int = 0


class Caller(Protocol):
    """Carries one request at a time; `in_flight` is the one it waits for."""

    in_flight: InFlight | None

    def send(self, in_flight: InFlight) -> None:
        """Send a request; the caller must be usable."""

    def usable(self) -> bool:
        """Whether it can take a request now."""

    def fail(self, kind: str) -> None:
        """Give the request up."""

    def close(self) -> None:
        """Leave nothing open; the owner hears of it when it is `lost`."""


class Owner(Protocol):
    """Whom callers report to: a loop."""

    def made(self, caller: Caller) -> None:
        """It is open."""

    def lost(self, caller: Caller, *, answered: bool) -> None:
        """Its connection is gone, and so is the caller; `answered`: it had replies."""

    def reconnected(self) -> None:
        """A caller opened a further connection by itself."""

    def ready(self, caller: Caller) -> None:
        """It can take a request."""

    def replied(
        self,
        in_flight: InFlight,
        status: int,
        num_bytes: int,
        retry_after: bool,
        problem: str | None,
        version: Version | None,
    ) -> None:
        """A whole reply arrived at `in_flight.done`; `problem`: why it is no answer to the request."""

    def failed(self, in_flight: InFlight, kind: str) -> None:
        """The request gets no reply."""

    def broken(self, error: BaseException) -> None:
        """The generator itself failed."""


class Engine(Protocol):
    """Makes requests and callers."""

    def next(self, second: float) -> Request:
        """The next request, `second` seconds after the measurement began."""

    async def open(self, owner: Owner) -> None:
        """Open one caller, which is then `made`; OSError when the server cannot be reached."""
