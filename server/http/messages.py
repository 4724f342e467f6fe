"""What a call is made of, whoever carries it: the HTTP protocol hands in a Request and writes out a Reply."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embstore.errors import BadRequest, DeadlineExceeded
from server.http.buffer_pool import Floats
from server.http.routing import Route

Buffer = bytes | memoryview

FOREVER = float("inf")
COPIED_BYTES = 32 << 10
"""Replies up to this size are copied when they are sent."""
MAX_TIMEOUT_MS = 24 * 3_600_000


class Request:
    """One complete lookup call."""

    __slots__ = ("began", "body", "deadline", "headers", "id", "method", "route", "started")

    def __init__(
        self,
        method: bytes,
        route: Route,
        headers: Mapping[bytes, bytes],
        body: bytes,
        id: bytes,
        began: float,
    ) -> None:
        self.method, self.route, self.headers, self.body, self.id = method, route, headers, body, id
        self.began = began
        """`time.perf_counter()` when the head had arrived."""
        self.started = began
        """The same clock when its turn came."""
        self.deadline = FOREVER
        """The same clock when nobody waits any longer."""

    def check_deadline(self) -> None:
        """DeadlineExceeded when nobody waits for the answer any more."""
        if time.perf_counter() > self.deadline:
            raise DeadlineExceeded(f"the {self.deadline - self.began:.3f} seconds that the caller gave are over")


class Reply(NamedTuple):
    """Status, header lines and body of an answer; what every reply carries (date, length, id) is added when sent."""

    status: int
    head: bytes
    """Header lines, each with its end of line, without content-length, x-request-id, connection and date."""
    body: tuple[Buffer, ...] = ()
    """Sent one after the other."""
    leases: Sequence[Floats] = ()
    """Memory behind `body` that is lent for this reply, given back when the last byte is with the kernel."""


def deadline_of(headers: Mapping[bytes, bytes], began: float) -> float:
    """When the caller stops waiting, by its X-Request-Timeout-Ms; BadRequest when that is no number of milliseconds."""
    text = headers.get(b"x-request-timeout-ms")
    if text is None:
        return FOREVER
    if not (text.isdigit() and len(text) < 10 and int(text) <= MAX_TIMEOUT_MS):
        raise BadRequest(f"X-Request-Timeout-Ms must be whole milliseconds, at most {MAX_TIMEOUT_MS:,} of them")
    return began + int(text) / 1000
