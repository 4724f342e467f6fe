"""A connection: its limits, what is sent on it, how it ends. What arrives is `server.http.protocol`'s.

Connections have limits of their own: time for a request to arrive, time to take a reply, idle time, their number.
Relies on uvicorn's HttpToolsProtocol, whose minor version is pinned.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from embstore.errors import Draining, EmbstoreError
from server.http.buffer_pool import Floats
from server.http.cycle import Cycle
from server.http.messages import COPIED_BYTES, Buffer, Reply
from server.http.problems import MEDIA_TYPE, problem
from server.http.services import Services

LINGER_SECONDS = 2.0
QUIET_SECONDS = 1.0
"""At shutdown a connection that was used less than this ago may have its next request on the way."""
MIN_WRITE_PROGRESS_BYTES = 16 << 10
"""Bytes of its replies that a client takes at least in `request_seconds`, or it counts as gone."""
_CODES = {400: "malformed_request", 408: "request_timeout", 429: "overloaded", 431: "head_too_large"}


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits. `config.app.services` is what all connections share."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        app: Any = self.config.app
        self.services: Services = app.services
        self.arriving: Cycle | None = None
        """The lookup that is arriving, or came last."""
        self.current: Any = None
        """Whose turn it is: the cycle, ours or uvicorn's, that is being answered."""
        self.fd = -1
        self.over_uds = False
        self.idle_since: float | None = None
        self.receiving_since: float | None = None
        self.lingers_until: float | None = None
        self.ending = False
        """The client has said that no more comes."""
        self.failed: tuple[int, str] | None = None
        """What to say when everything that came whole has been answered."""
        self.num_replies = 0
        self._unsent: tuple[int, int, float] | None = None
        """As of then: the replies begun, the bytes that the client had not taken."""
        self._dates: tuple[Any, bytes] = (None, b"")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it; one too many is closed at once."""
        super().connection_made(transport)
        self.services.connections.add(self)
        if len(self.services.connections) > self.services.limits.max_connections:
            self.services.lookups.reject("overloaded")
            transport.abort()
            return
        self.idle_since = time.monotonic()
        connection = transport.get_extra_info("socket")
        self.over_uds = connection is not None and connection.family == socket.AF_UNIX
        if transport.get_extra_info("sslcontext") is None:
            self.fd = connection.fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """Every cycle that is not answered has lost its client."""
        self.fd = -1
        self.services.connections.discard(self)
        for waiting in {self.arriving, self.current, *(waiting for waiting, _ in self.pipeline)}:
            if isinstance(waiting, Cycle) and not waiting.response_complete:
                waiting.disconnected = True
                if not waiting.submitted:
                    waiting.drop()
                    self.services.lookups.reject("disconnected")
        self.pipeline.clear()
        super().connection_lost(exc)
        self.arriving = None

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """No more comes: what has come whole is answered, then the connection ends."""
        self.ending = True
        cycle = self.arriving
        arriving = cycle is self.current and cycle is not None and not cycle.complete
        return True if self._busy() and not arriving else None

    def shutdown(self) -> None:
        """End after the replies in progress, or once nothing has come for a moment: no request in flight is lost."""
        if self._busy() or self.receiving_since is not None:
            if self.cycle is not None:
                self.cycle.keep_alive = False
            if self.arriving is None or not self.arriving.complete:
                self.loop.call_later(max(0.0, self.services.limits.shutdown_seconds - 0.25), self._give_up)
            return
        quiet = time.monotonic() - (self.idle_since or 0.0)
        if quiet < QUIET_SECONDS:
            self.loop.call_later(QUIET_SECONDS - quiet, self.shutdown)
        else:
            self.transport.close()

    def _give_up(self) -> None:
        """The request that was arriving at shutdown never came whole."""
        cycle = self.arriving
        if self.receiving_since is None or self.transport.is_closing():
            return
        if cycle is None:
            self.transport.close()
        else:
            self._refuse(cycle, Draining("the server is shutting down and the request is not complete"))

    def sweep(self, now: float) -> None:
        """Called about once a second: end what has been idle, arriving or unread for too long."""
        limits = self.services.limits
        if self.lingers_until is not None:
            if now > self.lingers_until and self._num_unsent() == 0:
                self.transport.abort()
        elif self.receiving_since is not None and self.flow.read_paused:
            self.receiving_since = now  # it is us who do not listen
        elif self.receiving_since is not None and now - self.receiving_since > limits.request_seconds:
            self._fail(408, f"the request did not arrive within {limits.request_seconds:g} seconds")
        elif self.idle_since is not None and now - self.idle_since > limits.keepalive_seconds:
            self.transport.close()
        waits = self.lingers_until is not None or self.transport.get_write_buffer_size() > 0
        left = self._num_unsent() if waits else 0
        if left == 0:
            self._unsent = None
        elif (
            self._unsent is None
            or self._unsent[0] != self.num_replies
            or self._unsent[1] - left >= MIN_WRITE_PROGRESS_BYTES
        ):
            self._unsent = self.num_replies, left, now
        elif now - self._unsent[2] > limits.request_seconds:
            self.transport.abort()

    def _num_unsent(self) -> int:
        """Bytes that the client has not taken, here and in the kernel."""
        waiting: int = self.transport.get_write_buffer_size()
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return waiting + int.from_bytes(queued, sys.byteorder)

    def _free(self) -> bool:
        """Whether nobody is being answered."""
        return self.current is None or self.current.response_complete or self.current.disconnected

    def _busy(self) -> bool:
        """Whether somebody is being answered, or waits for it."""
        return bool(self.pipeline) or not self._free()

    def _refuse(self, cycle: Cycle, error: EmbstoreError) -> None:
        """Answer before the body is there, and close: what follows on this connection is not worth reading."""
        if cycle is not self.current:
            cycle.body.error = error
            return
        cycle.body.drop()
        cycle.keep_alive = False
        cycle.refuse(error)

    def _fail(self, status: int, detail: str) -> None:
        """Answer what cannot be a request, and close."""
        raise NotImplementedError

    # What is sent

    def _send_reply(self, reply: Reply, request_id: bytes, method: bytes, keep_alive: bool) -> None:
        """Send a reply, with what every reply carries."""
        body = reply.body
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        head = b"%s%scontent-length: %d\r\nx-request-id: %s\r\n%s%s" % (
            STATUS_LINE[reply.status],
            reply.head,
            size,
            request_id,
            self._date(),
            b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
        )
        if method == b"HEAD":
            body, size = (), 0
        self.num_replies += 1
        self.server_state.total_requests += 1
        self.services.outbox.send(self, (head, *body), len(head) + size, reply.leases)

    def write(self, parts: Sequence[Buffer], num_bytes: int, leases: Sequence[Floats]) -> None:
        """Send bytes, and give the memory behind them back as soon as nobody reads it any more.

        Small replies are joined for the transport. Large ones go to the kernel as they are; the transport keeps what
        is left over, and then their memory is its own.
        """
        transport, buffers = self.transport, self.services.buffers
        if num_bytes <= COPIED_BYTES:
            transport.write(b"".join(parts))
            buffers.give_back(leases)
            return
        sent = 0
        if self.fd >= 0 and transport.get_write_buffer_size() == 0:
            with suppress(OSError):  # full, or broken: the transport finds out
                sent = os.writev(self.fd, parts)
            if sent == num_bytes:
                buffers.give_back(leases)
                return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                transport.write(memoryview(part)[sent:] if sent else part)
                sent = 0

    def _hang_up(self, status: int, detail: str) -> None:
        """Say what was wrong, and close."""
        self.services.outbox.flush()
        request_id = self.services.handler.request_id({})
        _, body = problem(_CODES[status], detail, request_id.decode())
        head = b"%scontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n%s"
        self.transport.write(head % (STATUS_LINE[status], MEDIA_TYPE, len(body), request_id, body))
        self._close(whole=False)

    def _close(self, *, whole: bool) -> None:
        """End the connection: half-close, then drain. Closing while bytes arrive would reset it, and lose replies."""
        if whole or not self.transport.can_write_eof():
            self.transport.close()
        elif self.lingers_until is None:
            self.lingers_until = time.monotonic() + LINGER_SECONDS
            self.transport.write_eof()
            self.flow.resume_reading()

    def _date(self) -> bytes:
        """uvicorn's default headers (the date), joined once a second."""
        headers = self.server_state.default_headers
        known, joined = self._dates
        if known is not headers:
            joined = b"".join(b"%s: %s\r\n" % pair for pair in headers)
            self._dates = (headers, joined)
        return joined
