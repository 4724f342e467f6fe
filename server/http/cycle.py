"""One request and its reply on a connection: the request while it arrives, then its turn, then the reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from embstore.errors import BadRequest, EmbstoreError
from server.http.body import Body
from server.http.messages import Reply, Request, deadline_of
from server.http.routing import Route
from server.http.services import Services


class _Event:
    """What uvicorn sets when a connection is lost; nobody waits for it here."""

    def set(self) -> None:
        """Nothing."""


_EVENT: Any = _Event()


class Head(NamedTuple):
    """The head of a request, parsed."""

    method: bytes
    route: Route
    headers: dict[bytes, bytes]
    keep_alive: bool
    began: float
    """`time.perf_counter()` when it began to arrive."""


class Cycle:
    """Stands where uvicorn has its RequestResponseCycle: it reads and sets some of these attributes."""

    message_event = _EVENT

    def __init__(self, services: Services, head: Head, send: Callable[[Cycle, Reply], None]) -> None:
        """send: called once, with the reply."""
        self._services, self._send = services, send
        self.head, self.keep_alive = head, head.keep_alive
        self.body = Body(head.headers, services.limits.max_body_bytes, services.admission)
        self.complete = self.submitted = False
        self.response_complete = self.disconnected = False
        self.request: Request | None = None
        self.new_head = b""
        """The bytes of its head, where the request was all that one read brought and its head has no plan."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its body."""
        return self.body.num_bytes

    def finish(self) -> EmbstoreError | None:
        """The body is complete: make the request of it; or why it is refused."""
        self.body.release()
        self.submitted = True
        request = self._make_request()
        try:
            if b"x-request-timeout-ms" in request.headers:
                request.deadline = deadline_of(request.headers, request.began)
            request.body = self.body.whole()
        except BadRequest as error:
            return error
        return None

    def answer(self) -> Awaitable[None] | None:
        """Answer and send; a coroutine where there is something to wait for."""
        assert self.request is not None
        handler = self._services.handler
        if self.disconnected:
            handler.forget()
            return None
        reply = handler.answer(self.request)
        if type(reply) is Reply:
            self._send(self, reply)
            return None
        return self.send_later(reply)  # type: ignore[arg-type]

    async def send_later(self, reply: Awaitable[Reply]) -> None:
        """Send a reply that has to be waited for."""
        self._send(self, await reply)

    def refuse(self, error: EmbstoreError) -> None:
        """Answer with an error, without a lookup."""
        request = self.request or self._make_request()
        self._send(self, self._services.handler.refuse(request, error))

    def drop(self) -> None:
        """It will not be answered."""
        self.body.drop()
        self.response_complete = True

    def _make_request(self) -> Request:
        method, route, headers, _, began = self.head
        request_id = self._services.handler.request_id(headers)
        self.request = Request(method, route, headers, b"", request_id, began)
        return self.request
