"""The server as one ASGI app: the request street in front, FastAPI behind.

Under `server.http.protocol` lookups never come this way. Under any other ASGI server they do:
the same street, read and written by ASGI messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from inspect import isawaitable
from typing import TYPE_CHECKING, Any

from embstore.errors import BadRequest, BodyTooLarge, Draining, EmbstoreError, Unauthorized, UnsupportedMediaType
from server.http.auth import OPEN_PATHS
from server.http.messages import Reply, Request, deadline_of
from server.http.routing import Route, Routes

if TYPE_CHECKING:
    from server.api.lookup import Limits, Street
    from server.http.admission import Gate
    from server.http.buffer_pool import Buffers
    from server.http.protocol import LookupProtocol
    from server.metrics.recorder import Lookups

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Inner = Callable[[Scope, Receive, Send], Awaitable[None]]


class Disconnected(Exception):
    """The client went away before its body was complete: nobody is left to answer."""


class App:
    """What uvicorn runs: routes, street, gate and limits for its protocol, ASGI for everything else."""

    def __init__(
        self, inner: Inner, street: Street, gate: Gate, buffers: Buffers, lookups: Lookups, limits: Limits
    ) -> None:
        self.inner, self.street, self.gate, self.buffers = inner, street, gate, buffers
        self.lookups, self.limits = lookups, limits
        self.routes = Routes()
        self.connections: set[LookupProtocol] = set()

    @property
    def draining(self) -> bool:
        """Whether the server is on its way down."""
        return self.street.health.draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self.street.health.draining = value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        headers = dict(scope["headers"])
        query = scope.get("query_string", b"")
        path = scope.get("raw_path") or scope["path"].encode()
        route = self.routes.find(path + b"?" + query if query else path)
        request_id = self.street.request_id(headers)
        if route is None:
            return await self._inner(scope, headers, receive, send, request_id)
        request = Request(scope["method"].encode(), route, headers, b"", request_id, time.perf_counter())
        try:
            request.deadline = deadline_of(headers, request.began)
            request.body = await self._body(headers, receive)
            answer = self.street.answer(request)
            reply: Any = await answer if isawaitable(answer) else answer
        except EmbstoreError as error:
            reply = self.street.refuse(request, error)
        except Disconnected:
            return self.street.forget()
        await self._send(request, reply, send)

    async def _inner(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send, request_id: bytes
    ) -> None:
        """FastAPI's part of the work, behind the keys, with the request's id in its reply too."""
        scope["request_id"] = request_id.decode()
        if not self.street.keys.open and scope["path"] not in OPEN_PATHS:
            try:
                self.street.keys.check(headers)
            except Unauthorized as error:
                on_v2 = scope["path"].startswith("/v2")
                route = Route("", on_v2=on_v2)
                request = Request(scope["method"].encode(), route, headers, b"", request_id, time.perf_counter())
                return await self._send(request, self.street.refuse(request, error), send)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._last([*message["headers"], (b"x-request-id", request_id)])}
            await send(message)

        await self.inner(scope, receive, named)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, never more of it in memory than is allowed."""
        limit = self.limits.max_body_bytes
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedMediaType("the body has a Content-Encoding; send it as it is")
        claimed = headers.get(b"content-length", b"")
        if claimed.isdigit() and int(claimed) > limit:
            raise BodyTooLarge(f"the body has {int(claimed):,} bytes; the limit is {limit:,}", limit=limit)
        parts, num_bytes, more = [], 0, True
        while more:
            part, more = await _receive_part(receive)
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > limit:
                raise BodyTooLarge(f"the body has more than {limit:,} bytes, which is the limit", limit=limit)
        if claimed.isdigit() and int(claimed) != num_bytes:
            raise BadRequest(f"{num_bytes:,} bytes of the body arrived, Content-Length says {int(claimed):,}")
        return b"".join(parts)

    async def _send(self, request: Request, reply: Reply, send: Send) -> None:
        size = sum(map(len, reply.body))
        headers = [tuple(line.split(b": ", 1)) for line in reply.head.split(b"\r\n") if line]
        headers += [(b"content-length", b"%d" % size), (b"x-request-id", request.id)]
        await send({"type": "http.response.start", "status": reply.status, "headers": self._last(headers)})
        for part in reply.body:
            await send({"type": "http.response.body", "body": bytes(part), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.buffers.give_back(reply.lease)

    def _last(self, headers: list[Any]) -> list[Any]:
        """While draining, ask the client to take its next request elsewhere."""
        if self.draining:
            headers.append((b"connection", b"close"))
        return headers


async def _receive_part(receive: Receive) -> tuple[bytes, bool]:
    """The next part of a body, and whether there is more."""
    try:
        message = await receive()
    except asyncio.CancelledError:
        raise Draining("the server is shutting down and the request is not complete") from None
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message.get("body", b""), message.get("more_body", False)
