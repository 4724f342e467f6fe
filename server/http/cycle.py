"""One lookup on a connection: its request while it arrives, its reply when it is sent."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from embstore.errors import BadRequest, BodyTooLarge, EmbstoreError, Overloaded, UnsupportedMediaType
from server.http.messages import Reply, Request, deadline_of
from server.http.routing import Route

if TYPE_CHECKING:
    from server.http.protocol import LookupProtocol

FREE_BODY_BYTES = 64 << 10
"""Room for bodies up to this size is not asked for: what one read brings is here already."""


class _Event:
    """What uvicorn sets when a connection is lost; nobody waits for it here."""

    def set(self) -> None:
        """Nothing."""


_EVENT: Any = _Event()


class Exchange:
    """Stands where uvicorn has its cycle: it reads and sets some of these attributes."""

    message_event = _EVENT

    def __init__(self, protocol: LookupProtocol, route: Route, began: float) -> None:
        self.protocol, self.route, self.began = protocol, route, began
        parser = protocol.parser
        self.method: bytes = parser.get_method()
        self.headers = headers = dict(protocol.headers)
        self.keep_alive: bool = parser.should_keep_alive()
        if self.keep_alive and b"connection" in headers and parser.get_http_version() == "1.0":
            self.keep_alive = False
        self.parts: list[bytes] = []
        self.num_bytes = self._reserved = 0
        self.error: EmbstoreError | None = None
        """Why it is refused when its turn comes, known before its body was complete."""
        self.complete = self.submitted = False
        self.response_complete = self.disconnected = False
        self.request: Request | None = None

    def check_head(self) -> None:
        """Look for reasons to refuse before any of the body is taken, and reserve room for it."""
        headers, app = self.headers, self.protocol.app
        claimed = headers.get(b"content-length", b"")
        size = int(claimed) if claimed.isdigit() else 0
        if b"content-encoding" in headers and headers[b"content-encoding"] != b"identity":
            self.error = UnsupportedMediaType("the body has a Content-Encoding; send it as it is")
        elif size > app.limits.max_body_bytes:
            self.error = _too_large(f"{size:,} bytes, more than", app.limits.max_body_bytes)
        elif size > FREE_BODY_BYTES:
            self._reserve(size)

    def add(self, part: bytes) -> None:
        """A part of the body; dropped where the request is refused anyway."""
        if self.error is not None or self.response_complete:
            return
        self.parts.append(part)
        self.num_bytes += len(part)
        limit = self.protocol.app.limits.max_body_bytes
        if self.num_bytes > limit:
            self.error = _too_large("more than", limit)
        elif self.num_bytes > max(FREE_BODY_BYTES, self._reserved):  # chunked: nobody said how much it would be
            self._reserve(self.num_bytes)

    def release(self) -> None:
        """Its body is somebody else's to count now, or gone."""
        self.protocol.app.gate.arriving_bytes -= self._reserved
        self._reserved = 0

    def finish(self) -> bool:
        """The body is whole: make the request of it; False when it is refused, which `error` explains."""
        headers, parts = self.headers, self.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        street = self.protocol.app.street
        self.request = Request(self.method, self.route, headers, body, street.request_id(headers), self.began)
        try:
            if b"x-request-timeout-ms" in headers:
                self.request.deadline = deadline_of(headers, self.began)
            claimed = headers.get(b"content-length")
            if claimed is not None and int(claimed) != len(body):
                raise BadRequest(
                    f"{len(body):,} bytes of the body arrived, Content-Length says {int(claimed):,}; "
                    "a request that asks for an Upgrade loses its body"
                )
        except BadRequest as error:
            self.error = error
            return False
        return True

    def answer(self) -> Awaitable[None] | None:
        """Look up and send; a coroutine where there is something to wait for."""
        request, street = self.request, self.protocol.app.street
        assert request is not None
        if self.disconnected:
            street.forget()
            return None
        reply = street.answer(request)
        if type(reply) is Reply:
            self.protocol.send(self, reply)
            return None
        return self._answer_later(reply)

    async def _answer_later(self, reply: Awaitable[Reply]) -> None:
        self.protocol.send(self, await reply)

    def refuse(self, error: EmbstoreError) -> None:
        """Answer with an error, without a lookup."""
        street = self.protocol.app.street
        if self.request is None:
            request_id = street.request_id(self.headers)
            self.request = Request(self.method, self.route, self.headers, b"", request_id, self.began)
        self.protocol.send(self, street.refuse(self.request, error))

    def _reserve(self, size: int) -> None:
        gate = self.protocol.app.gate
        more = size - self._reserved
        if gate.has_room(more):
            gate.arriving_bytes += more
            self._reserved = size
        else:
            self.error = Overloaded("the server holds as many bytes of requests as it may", retry_after=1)


def _too_large(how: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {how} {limit:,} bytes, which is the limit", limit=limit)
