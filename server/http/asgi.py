"""The server as one ASGI app: what is not a lookup, behind the API keys, with the request's id in its reply too."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from embstore.errors import Unauthorized
from server.http.auth import OPEN_PATHS, ApiKeys
from server.http.messages import Reply, Request
from server.http.routing import Route
from server.http.services import Services

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Inner = Callable[[Scope, Receive, Send], Awaitable[None]]


class App:
    """What uvicorn runs. Its protocol, `server.http.protocol`, answers lookups with `services`; the rest comes here."""

    def __init__(self, inner: Inner, services: Services, keys: ApiKeys, is_loaded: Callable[[], bool]) -> None:
        """is_loaded: whether the store was looked at once."""
        self.inner, self.services, self.keys, self.is_loaded = inner, services, keys, is_loaded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request that is not a lookup, or the lifespan."""
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        handler, headers, path = self.services.handler, dict(scope["headers"]), scope["path"]
        request_id = handler.request_id(headers)
        scope["request_id"] = request_id.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                lines = [*message["headers"], (b"x-request-id", request_id)]
                if handler.draining:  # ask the client to take its next request elsewhere
                    lines.append((b"connection", b"close"))
                message = {**message, "headers": lines}
            await send(message)

        if not self.keys.open and path not in OPEN_PATHS:
            try:
                self.keys.check(headers)
            except Unauthorized as error:
                route = Route("", on_v2=path.startswith("/v2"))
                request = Request(scope["method"].encode(), route, headers, b"", request_id, time.perf_counter())
                return await _send(handler.refuse(request, error), named)
        await self.inner(scope, receive, named)


async def _send(reply: Reply, send: Send) -> None:
    """A reply by ASGI messages."""
    body = b"".join(reply.body)
    headers = [tuple(line.split(b": ", 1)) for line in reply.head.split(b"\r\n") if line]
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
