"""HTTP/1.1 for lookups, on uvicorn's protocol: bytes become requests here, and take their turn.

uvicorn makes a scope, a cycle and a task for every request, and a timer after it: that is most of the time of a
lookup of ten ids. Here a lookup is a `Cycle`, answered by a plain call; one whose head was seen before is not even
parsed (`server.http.plans`); whatever is not a lookup goes uvicorn's way to FastAPI.
"""

from __future__ import annotations

import time
from typing import Any

import httptools

from embstore.errors import BadRequest
from server.http.connection import Connection
from server.http.cycle import Cycle, Head
from server.http.messages import Reply, Request, deadline_of
from server.http.plans import MAX_HEAD_BYTES as MAX_PLANNED_BYTES
from server.http.plans import Plan, is_usual
from server.http.routing import HEALTH

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 256
MAX_PIPELINED = 512
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class _HeadTooLarge(Exception):
    """Ends the parsing of a head."""


class LookupProtocol(Connection):
    """A connection on which lookups are answered by `services.handler`, and the rest by uvicorn's ASGI app."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.in_head = self.head_is_new = False
        self.head_bytes = self.read_bytes = 0
        """Of this head in reads after the one that it began in, and of the latest read."""
        self.began = 0.0
        self._going = False
        self._new_head = b""
        """The head that the latest read began with, where it has no plan yet."""

    # A head seen before

    def _answer_planned(self, data: bytes) -> bool:
        """Answer a read that is one whole request with a known head; False where it has to be parsed."""
        services = self.services
        end = data.find(b"\r\n\r\n", 0, MAX_PLANNED_BYTES) + 4
        if end < 4:
            return False
        plan = services.plans.find(head := data[:end])
        if plan is None:
            self._new_head = head
            return False
        began, num_bytes = time.perf_counter(), plan.content_length
        if len(data) - end != num_bytes or services.draining:
            return False
        if not services.admission.admits_at_once(began, self.loop.time(), num_bytes):
            return False
        request_id = plan.request_id or services.handler.new_request_id()
        reply, request = services.handler.answer_planned(plan, request_id, data[end:], began)
        if type(reply) is Reply:
            self._send_reply(reply, request_id, b"POST", keep_alive=True)
            self.idle_since = time.monotonic()
            return True
        assert request is not None
        cycle = Cycle(services, Head(b"POST", plan.route, plan.headers, True, began), self.send)
        cycle.request, cycle.complete, cycle.submitted = request, True, True
        cycle.body.release()
        self.cycle = self.arriving = self.current = cycle  # type: ignore[assignment]
        self.idle_since = None
        services.admission.run(cycle.send_later(reply))  # type: ignore[arg-type]
        return True

    def _keep_plan(self, head: bytes, request: Request) -> None:
        """Remember the head of a request that was all that one read brought, if it is a usual one."""
        headers = dict(request.headers)
        if is_usual(head, request.method, request.route, headers):
            given = request.id if headers.get(b"x-request-id") == request.id else None
            timeout_s = deadline_of(headers, 0.0)
            self.services.plans.keep(head, Plan(request.route, headers, given, timeout_s))

    # What arrives

    def data_received(self, data: bytes) -> None:
        """Parse; callbacks below do the work."""
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        parser = self.parser
        if parser is None or self.failed or self.lingers_until is not None or self.transport.is_closing():
            return
        self.read_bytes, self._new_head = len(data), b""
        if (
            self.receiving_since is None  # nothing is arriving, waits here, or is left to send
            and (self.cycle is None or self.cycle.response_complete)
            and not (self.pipeline or self.flow.write_paused or self.ending)
            and self._answer_planned(data)
        ):
            return
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
        self.url, self.headers, self.arriving = b"", [], None
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
        """A lookup gets a Cycle; anything else becomes uvicorn's."""
        self.in_head = False
        if self.read_bytes + self.head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._check_head()
        route = self.services.routes.find(self.url)
        if route is None:
            return self._to_asgi()
        parser, headers = self.parser, dict(self.headers)
        keep_alive: bool = parser.should_keep_alive()
        if keep_alive and b"connection" in headers and parser.get_http_version() == "1.0":
            keep_alive = False
        head = Head(parser.get_method(), route, headers, keep_alive, self.began)
        cycle = self.arriving = Cycle(self.services, head, self.send)
        if parser.should_upgrade() and (b"content-length" in headers or b"transfer-encoding" in headers):
            cycle.body.error = BadRequest("the body of a request with an Upgrade header is not read")
        before, self.cycle = self.cycle, cycle  # type: ignore[assignment]
        if self.failed:
            cycle.drop()
        elif (before is None or before.response_complete) and not self.flow.write_paused:
            self.current = cycle
            self._start(cycle)
        elif len(self.pipeline) < MAX_PIPELINED:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.config.app))  # type: ignore[arg-type]
        else:
            self._fail(429, f"more than {MAX_PIPELINED} requests wait on this connection")

    def on_body(self, body: bytes) -> None:
        """A part of a body; never more of it in memory than is allowed."""
        cycle = self.arriving
        if cycle is None:
            return super().on_body(body)
        if cycle.response_complete:
            return
        cycle.body.add(body)
        if cycle.body.error is not None and cycle is self.current:
            self._refuse(cycle, cycle.body.error)

    def on_message_complete(self) -> None:
        """The request is whole: answer it, now or in its turn."""
        self.receiving_since = None
        cycle = self.arriving
        if cycle is None:
            return super().on_message_complete()
        if not cycle.response_complete:
            cycle.complete = True
            if len(self._new_head) + cycle.num_bytes == self.read_bytes:
                cycle.new_head = self._new_head
            if cycle is self.current:
                self._submit(cycle)

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
        if self.parser.should_upgrade():  # what follows may be its body, which the parser does not read
            self.cycle.keep_alive = False

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
        if isinstance(cycle, Cycle):
            self._start(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _start(self, cycle: Cycle) -> None:
        """The connection is this cycle's now."""
        if cycle.body.error is not None:
            self._refuse(cycle, cycle.body.error)
        elif cycle.complete:
            self._submit(cycle)
        elif self.ending or self.failed:  # the rest of it will not come
            cycle.drop()
            self.services.lookups.reject("disconnected")
            self.transport.close()
        else:
            self.flow.resume_reading()
            if cycle.head.headers.get(b"expect", b"").lower() == b"100-continue":
                self.services.outbox.flush()
                self.transport.write(_CONTINUE)

    def _submit(self, cycle: Cycle) -> None:
        """Hand a complete request to the queue; a probe is answered at once."""
        error = cycle.finish()
        if error is not None:
            cycle.refuse(error)
        elif cycle.head.route.kind == HEALTH:
            cycle.answer()
        else:
            self.services.admission.submit(cycle)

    def _is_closed(self) -> bool:
        """Whether nothing more may be sent."""
        return self.lingers_until is not None or self.transport.is_closing()

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
            while self.pipeline and self._free() and not self.flow.write_paused and not self._is_closed():
                self._start_asgi_task(*self.pipeline.pop())
        finally:
            self._going = False
        if self._busy() or self._is_closed():
            return
        if self.failed:
            self._hang_up(*self.failed)
        elif self.ending:
            self.services.outbox.flush()
            self.transport.close()
        else:
            self.flow.resume_reading()

    # What is sent

    def send(self, cycle: Cycle, reply: Reply) -> None:
        """Send a complete reply and go on with the connection."""
        services = self.services
        request = cycle.request
        assert request is not None
        cycle.response_complete, cycle.request = True, None
        cycle.body.drop()
        if cycle.disconnected or self.transport.is_closing():
            services.buffers.give_back(reply.leases)
            return
        draining = services.draining
        if draining and not self.pipeline:  # what this connection has sent already is answered first
            cycle.keep_alive = False
        if cycle.new_head and cycle.keep_alive and reply.status == 200:
            self._keep_plan(cycle.new_head, request)
        self._send_reply(reply, request.id, request.method, cycle.keep_alive)
        if not cycle.keep_alive:
            services.outbox.flush()
            self._close(whole=cycle.complete and not draining)  # or what it sent on would be read by nobody
            return
        self.idle_since = time.monotonic()
        if self.pipeline or self.flow.read_paused or self.ending or self.failed:
            self._next()

    def _fail(self, status: int, detail: str) -> None:
        """Answer what cannot be a request, after everything that came whole before it, and close."""
        self.services.lookups.reject("overloaded" if status == 429 else "malformed")
        self.receiving_since = None
        self.failed = status, detail
        arriving: Any = self.arriving
        if arriving is None:
            arriving = self.cycle
            if arriving is not None and not isinstance(arriving, Cycle) and arriving.more_body:
                arriving.disconnected = True  # uvicorn's call is told that its client has gone
                arriving.message_event.set()
                self._drop_last(arriving)
        elif not arriving.complete and not arriving.response_complete:
            arriving.drop()
            self._drop_last(arriving)
        self._next()

    def _drop_last(self, arriving: Any) -> None:
        """Whoever came last never came whole."""
        if self.pipeline and self.pipeline[0][0] is arriving:
            self.pipeline.popleft()
