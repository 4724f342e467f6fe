"""One connection of the load generator: writes prepared requests, reads as little of the replies as it can."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from loadtest.generator.interfaces import InFlight, Owner, Version

MAX_HEAD = 1 << 16
MAX_DIGITS = 18
"""Of a length; int() refuses numbers that are long enough."""


class RawConnection(asyncio.BufferedProtocol):
    """One request at a time; `in_flight` is the one it waits for, None when it waits for none.

    All connections of a load read into one buffer: bytes are looked at as soon as they are there, then forgotten.
    """

    def __init__(self, owner: Owner, buffer: bytearray) -> None:
        self.owner, self.buffer, self.view = owner, buffer, memoryview(buffer)
        self.transport: Any = None
        self.in_flight: InFlight | None = None
        self.head = b""
        self.left = self.size = self.status = 0
        self.last = self.retry_after = False
        self.problem: str | None = None
        self.version: Version | None = None

    def send(self, in_flight: InFlight) -> None:
        """Send a request; the connection must be idle."""
        self.in_flight, in_flight.sent = in_flight, time.perf_counter_ns()
        self.transport.write(in_flight.request.payload)

    def usable(self) -> bool:
        """Whether it is open and idle."""
        return self.in_flight is None and self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.owner.made(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self.view

    def buffer_updated(self, num: int) -> None:
        now = time.perf_counter_ns()
        if self.left:
            self.left -= num
        elif not self._read_head(num):
            return
        if self.left > 0:
            return
        if self.left < 0:
            self.fail("protocol")  # more than it said
            return
        in_flight, self.in_flight = self.in_flight, None
        assert in_flight is not None
        in_flight.done = now
        self.owner.replied(in_flight, self.status, self.size, self.retry_after, self.problem, self.version)
        if self.last:
            self.close()
        else:
            self.owner.ready(self)

    def _read_head(self, num: int) -> bool:
        """Whether the head is whole; then `left` is what is still to come of the body."""
        if self.head or self.in_flight is None:
            if self.in_flight is None:
                self.fail("protocol")  # nothing was in_flight
                return False
            self.head += self.buffer[:num]
            end = self.head.find(b"\r\n\r\n")
            head, num = self.head, len(self.head)
        else:
            end = self.buffer.find(b"\r\n\r\n", 0, num)
            head = bytes(self.view[: num if end < 0 else end])
        if end < 0:
            self.head = head
            if len(head) > MAX_HEAD:
                self.fail("protocol")
            return False
        self.head = b""
        lines = head[:end].lower()
        length = _value(lines, b"\r\ncontent-length:")
        status = lines[9:12]
        if not (lines.startswith(b"http/1.") and status.isdigit()):
            self.fail("protocol")
            return False
        self.status = int(status)
        if not length.isdigit() or len(length) > MAX_DIGITS:
            if self.status not in (204, 304):
                self.fail("protocol")  # a length is all that this reader understands
                return False
            length = b"0"
        self.last = _value(lines, b"\r\nconnection:") == b"close" or lines[7:8] == b"0"
        self.retry_after = b"\r\nretry-after:" in lines
        self.left = int(length) - (num - end - 4)
        self.size = int(length)
        self._check(head[:end])
        return True

    def _check(self, head: bytes) -> None:
        """Whether this is the answer, as far as its head tells."""
        assert self.in_flight is not None
        expect = self.in_flight.request.expect
        if expect is not None and 200 <= self.status < 300:
            pairs = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            self.problem = expect.problem(self.status, headers, None, self.size)
            self.version = expect.version(headers, None)
        else:
            self.problem = self.version = None

    def eof_received(self) -> None:
        """The transport closes; `connection_lost` counts what that means."""

    def connection_lost(self, error: Exception | None) -> None:
        if self.left > 0:
            self._give_up("truncated")
        self._give_up("reset" if isinstance(error, OSError) else "closed")
        self.owner.lost(self, answered=bool(self.status))

    def fail(self, kind: str) -> None:
        """Give the request up, and the connection with it."""
        self._give_up(kind)
        self.close()

    def _give_up(self, kind: str) -> None:
        if self.in_flight is not None:
            in_flight, self.in_flight = self.in_flight, None
            self.owner.failed(in_flight, kind)

    def close(self) -> None:
        """Close without waiting for anything."""
        self.transport.abort()


def _value(lines: bytes, name: bytes) -> bytes:
    """The value of a header, empty without it; `name` begins with the end of the line before."""
    at = lines.find(name)
    if at < 0:
        return b""
    at += len(name)
    end = lines.find(b"\r\n", at)
    return lines[at : end if end >= 0 else len(lines)].strip()
