"""HTTP/1.1 for lookups, on uvicorn's protocol: bytes become Exchanges here, and replies bytes.

uvicorn makes a scope, a cycle and a task for every request, and a timer after it: that is most of the time of a
lookup of ten ids. Here a lookup is an `Exchange`, answered by a plain call; whatever is not a lookup goes uvicorn's
way to FastAPI. Connections have limits of their own: size of a head, time for a request to arrive, time to take a
reply, idle time, number of connections. Relies on uvicorn's HttpToolsProtocol, whose version is pinned.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import sys
import termios
import time
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from embstore.errors import Draining, EmbstoreError
from server.http.cycle import Exchange
from server.http.messages import Reply
from server.http.problems import MEDIA_TYPE, problem
from server.http.routing import HEALTH

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
MAX_PIPELINED = 512
LINGER_SECONDS = 2.0
QUIET_SECONDS = 1.0
"""At shutdown a connection that was used less than this ago may have its next request on the way."""
LEAST_TAKEN = 16 << 10
"""Bytes of its replies that a client takes at least in `request_seconds`, or it counts as gone."""
COPIED_BYTES = 32 << 10
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CODES = {400: "malformed_request", 408: "request_timeout", 429: "overloaded", 431: "head_too_large"}


class _HeadTooLarge(Exception):
    """Ends the parsing of a head."""


class LookupProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a street of its own for lookups. `config.app` is a `server.http.asgi.App`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app: Any = self.config.app
        self.exchange: Exchange | None = None
        """The lookup that is arriving, or came last."""
        self.current: Any = None
        """Whose turn it is: the exchange, or uvicorn's cycle, that is being answered."""
        self.fd = -1
        self.over_uds = False
        self.in_head = self.head_is_new = False
        self.head_bytes = self.read_bytes = 0
        """Of this head in reads after the one that it began in, and of the latest read."""
        self.began = 0.0
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
        self._going = False
        self._dates: tuple[Any, bytes] = (None, b"")

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it; one too many is closed at once."""
        super().connection_made(transport)
        self.app.connections.add(self)
        if len(self.app.connections) > self.app.limits.max_connections:
            self.app.lookups.reject("overloaded")
            transport.abort()
            return
        self.idle_since = time.monotonic()
        connection = transport.get_extra_info("socket")
        self.over_uds = connection.family == socket.AF_UNIX
        if transport.get_extra_info("sslcontext") is None:
            self.fd = connection.fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """Every exchange that is not answered has lost its client."""
        self.fd = -1
        self.app.connections.discard(self)
        for waiting in {self.exchange, self.current, *(waiting for waiting, _ in self.pipeline)}:
            if isinstance(waiting, Exchange) and not waiting.response_complete:
                waiting.disconnected = True
                if not waiting.submitted:
                    self._drop(waiting)
                    self.app.lookups.reject("disconnected")
        self.pipeline.clear()
        super().connection_lost(exc)
        self.exchange = None

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """No more comes: what has come whole is answered, then the connection ends."""
        self.ending = True
        exchange = self.exchange
        arriving = exchange is self.current and exchange is not None and not exchange.complete
        return True if self._busy() and not arriving else None

    def shutdown(self) -> None:
        """End after the replies in progress, or once nothing has come for a moment: no request in flight is lost."""
        if self._busy() or self.receiving_since is not None:
            if self.cycle is not None:
                self.cycle.keep_alive = False
            if self.exchange is None or not self.exchange.complete:
                self.loop.call_later(max(0.0, self.app.limits.shutdown_seconds - 0.25), self._give_up)
            return
        quiet = time.monotonic() - (self.idle_since or 0.0)
        if quiet < QUIET_SECONDS:
            self.loop.call_later(QUIET_SECONDS - quiet, self.shutdown)
        else:
            self.transport.close()

    def _give_up(self) -> None:
        """The request that was arriving at shutdown never came whole."""
        exchange = self.exchange
        if self.receiving_since is None or self.transport.is_closing():
            return
        if exchange is None:
            self.transport.close()
        else:
            self._refuse(exchange, Draining("the server is shutting down and the request is not complete"))

    def sweep(self, now: float) -> None:
        """Called about once a second: end what has been idle, arriving or unread for too long."""
        limits = self.app.limits
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
        elif self._unsent is None or self._unsent[0] != self.num_replies or self._unsent[1] - left >= LEAST_TAKEN:
            self._unsent = self.num_replies, left, now
        elif now - self._unsent[2] > limits.request_seconds:
            self.transport.abort()

    def _num_unsent(self) -> int:
        """Bytes that the client has not taken, here and in the kernel."""
        waiting: int = self.transport.get_write_buffer_size()
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return waiting + int.from_bytes(queued, sys.byteorder)

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; callbacks below do the work."""
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        parser = self.parser
        if parser is None or self.failed or self.lingers_until is not None or self.transport.is_closing():
            return
        self.read_bytes = len(data)
        try:
            parser.feed_data(data)
            if self.in_head:
                self._grow_head(len(data))
        except _HeadTooLarge:
            self._fail(431, "the head of the request is too large")
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, _HeadTooLarge):
                self._fail(431, "the head of the request is too large")
            elif isinstance(error.__context__, httptools.HttpParserInvalidURLError):
                self._fail(400, "invalid request target")
            else:
                raise error.__context__ or error from None
        except httptools.HttpParserUpgrade:
            self._unsupported_upgrade_warning()
        except httptools.HttpParserError:
            self._fail(400, "invalid HTTP request")

    def on_message_begin(self) -> None:
        """A new head begins."""
        self.url, self.headers, self.exchange = b"", [], None
        self.in_head = self.head_is_new = True
        self.head_bytes, self.idle_since = 0, None
        if self.receiving_since is None:
            self.receiving_since = time.monotonic()
        self.began = time.perf_counter()

    def on_url(self, url: bytes) -> None:
        """A part of the request target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """A lookup gets an Exchange; anything else becomes uvicorn's."""
        self.in_head = False
        if self.read_bytes + self.head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._check_head()
        route = self.app.routes.find(self.url)
        if route is None:
            return self._to_asgi()
        exchange = self.exchange = Exchange(self, route, self.began)
        exchange.check_head()
        before, self.cycle = self.cycle, exchange  # type: ignore[assignment]
        if self.failed:
            exchange.response_complete = True
        elif (before is None or before.response_complete) and not self.flow.write_paused:
            self.current = exchange
            self._start(exchange)
        elif len(self.pipeline) < MAX_PIPELINED:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.config.app))  # type: ignore[arg-type]
        else:
            self._fail(429, f"more than {MAX_PIPELINED} requests wait on this connection")

    def on_body(self, body: bytes) -> None:
        """A part of a body; never more of it in memory than is allowed."""
        exchange = self.exchange
        if exchange is None:
            return super().on_body(body)
        exchange.add(body)
        if exchange.error is not None and exchange is self.current and not exchange.response_complete:
            self._refuse(exchange, exchange.error)

    def on_message_complete(self) -> None:
        """The request is whole: answer it, now or in its turn."""
        self.receiving_since = None
        exchange = self.exchange
        if exchange is None:
            return super().on_message_complete()
        if not exchange.response_complete:
            exchange.complete = True
            if exchange is self.current:
                self._submit(exchange)

    def _to_asgi(self) -> None:
        """This request is uvicorn's: give it the scope that `on_message_begin` did not make."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.scope["over_uds"] = self.over_uds  # type: ignore[typeddict-unknown-key]
        self.url = url
        self.expect_100_continue = any(
            name == b"expect" and b"100-continue" in value.lower() for name, value in headers
        )
        self.headers.extend(headers)
        super().on_headers_complete()

    def _check_head(self) -> None:
        """What was read may have been more than this head."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            raise _HeadTooLarge

    def _grow_head(self, num_bytes: int) -> None:
        """A read has ended inside a head. How much of the one that it began in was its own, nobody knows."""
        self.head_bytes += 0 if self.head_is_new else num_bytes
        self.head_is_new = False
        if self.head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            raise _HeadTooLarge

    # Whose turn it is

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Whose turn it is after a pipelined request: a lookup or one of uvicorn's."""
        self.current = cycle
        if isinstance(cycle, Exchange):
            self._start(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _start(self, exchange: Exchange) -> None:
        """The connection is this exchange's now."""
        if exchange.error is not None:
            self._refuse(exchange, exchange.error)
        elif exchange.complete:
            self._submit(exchange)
        elif self.ending or self.failed:  # the rest of it will not come
            self._drop(exchange)
            self.app.lookups.reject("disconnected")
            self.transport.close()
        else:
            self.flow.resume_reading()
            if exchange.headers.get(b"expect", b"").lower() == b"100-continue":
                self.app.gate.flush()
                self.transport.write(_CONTINUE)

    def _submit(self, exchange: Exchange) -> None:
        """Hand a complete request to the queue; a probe is answered at once."""
        exchange.release()
        exchange.submitted = True
        if not exchange.finish():
            assert exchange.error is not None
            exchange.refuse(exchange.error)
        elif exchange.route.kind == HEALTH:
            exchange.answer()
        else:
            self.app.gate.submit(exchange)

    def _refuse(self, exchange: Exchange, error: EmbstoreError) -> None:
        """Answer before the body is there, and close: what follows on this connection is not worth reading."""
        if exchange is not self.current:
            exchange.error = error
            return
        exchange.release()
        exchange.parts, exchange.keep_alive = [], False
        exchange.refuse(error)

    def _drop(self, exchange: Exchange) -> None:
        """It will not be answered."""
        exchange.release()
        exchange.parts, exchange.response_complete = [], True

    def on_response_complete(self) -> None:
        """uvicorn has answered: whose turn is it now?"""
        self.num_replies += 1
        self.idle_since = time.monotonic()
        super().on_response_complete()
        if not self.pipeline:
            self._next()

    def resume_writing(self) -> None:
        """The client has taken enough of its replies for the next one."""
        super().resume_writing()
        self._next()

    def _next(self) -> None:
        """The next pipelined request, if the client reads its replies; the end, if there is nothing more to answer."""
        if self._going:  # further out on the stack: it goes on when the reply that is being sent returns
            return
        self._going = True
        try:
            while self.pipeline and self._free() and not self.flow.write_paused and not self.transport.is_closing():
                self._start_asgi_task(*self.pipeline.pop())
        finally:
            self._going = False
        if self._busy() or self.transport.is_closing():
            return
        if self.failed:
            self._hang_up(*self.failed)
        elif self.ending:
            self.app.gate.flush()
            self.transport.close()
        else:
            self.flow.resume_reading()

    def _free(self) -> bool:
        """Whether nobody is being answered."""
        return self.current is None or self.current.response_complete or self.current.disconnected

    def _busy(self) -> bool:
        """Whether somebody is being answered, or waits for it."""
        return bool(self.pipeline) or not self._free()

    # What is sent

    def send(self, exchange: Exchange, reply: Reply) -> None:
        """Send a complete reply and go on with the connection."""
        app, transport = self.app, self.transport
        exchange.response_complete = True
        request = exchange.request
        assert request is not None
        exchange.parts, exchange.request = [], None
        if exchange.disconnected or transport.is_closing():
            app.buffers.give_back(reply.lease)
            return
        body = reply.body
        size = len(body[0]) if len(body) == 1 else sum(map(len, body))
        if app.draining and not self.pipeline:  # what this connection has sent already is answered first
            exchange.keep_alive = False
        head = b"%s%scontent-length: %d\r\nx-request-id: %s\r\n%s" % (
            STATUS_LINE[reply.status],
            reply.head,
            size,
            request.id,
            self._date(),
        )
        head += b"\r\n" if exchange.keep_alive else b"connection: close\r\n\r\n"
        if exchange.method == b"HEAD":
            body, size = (), 0
        self.num_replies += 1
        self.server_state.total_requests += 1
        app.gate.send(self, (head, *body), len(head) + size, reply.lease)
        if not exchange.keep_alive:
            app.gate.flush()
            self._close(whole=exchange.complete and not app.draining)  # or what it sent on would be read by nobody
            return
        self.idle_since = time.monotonic()
        if self.pipeline or self.flow.read_paused or self.ending or self.failed:
            self._next()

    def write(self, parts: tuple[Any, ...], num_bytes: int, lease: Any) -> None:
        """Send bytes, and give the memory behind them back as soon as nobody reads it any more.

        Small replies are joined for the transport. Large ones go to the kernel as they are; the transport keeps what
        is left over, and then their memory is its own.
        """
        transport, buffers = self.transport, self.app.buffers
        if num_bytes <= COPIED_BYTES:
            transport.write(b"".join(parts))
            buffers.give_back(lease)
            return
        sent = 0
        if self.fd >= 0 and transport.get_write_buffer_size() == 0:
            with suppress(OSError):  # full, or broken: the transport finds out
                sent = os.writev(self.fd, parts)
            if sent == num_bytes:
                buffers.give_back(lease)
                return
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                transport.write(memoryview(part)[sent:] if sent else part)
                sent = 0

    def _fail(self, status: int, detail: str) -> None:
        """Answer what cannot be a request, after everything that came whole before it, and close."""
        self.app.lookups.reject("overloaded" if status == 429 else "malformed")
        self.receiving_since = None
        self.failed = status, detail
        arriving: Any = self.exchange
        if arriving is None:
            arriving = self.cycle
            if arriving is not None and not isinstance(arriving, Exchange) and arriving.more_body:
                arriving.disconnected = True  # uvicorn's call is told that its client has gone
                arriving.message_event.set()
                self._drop_last(arriving)
        elif not arriving.complete and not arriving.response_complete:
            self._drop(arriving)
            self._drop_last(arriving)
        self._next()

    def _drop_last(self, arriving: Any) -> None:
        """Whoever came last never came whole."""
        if self.pipeline and self.pipeline[0][0] is arriving:
            self.pipeline.popleft()

    def _hang_up(self, status: int, detail: str) -> None:
        """Say what was wrong, and close."""
        self.app.gate.flush()
        request_id = self.app.street.request_id({})
        _, body = problem(_CODES[status], detail, request_id.decode())
        head = b"%scontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\nconnection: close\r\n\r\n%s"
        self.transport.write(head % (STATUS_LINE[status], MEDIA_TYPE, len(body), request_id, body))
        self._close(whole=False)

    def _close(self, *, whole: bool) -> None:
        """End the connection. Closing while bytes arrive would reset it, and lose replies: hang up, and hear it out."""
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
