"""The lookup handler as a plain ASGI app under stock uvicorn: what the server's own protocol classes are worth.

`python -m benchmarks.plain_asgi --store STORE --port 8002` serves the same tables by the same handler as
`embstore serve`, without admission, outbox and planned heads. Compare both under the same load, in one run.
"""

from __future__ import annotations

import argparse
from inspect import isawaitable
from pathlib import Path
from time import perf_counter
from typing import Any

import uvicorn

from server.app import create_app
from server.http.asgi import App, Receive, Scope, Send
from server.http.messages import Request, deadline_of
from server.settings import Settings


class PlainAsgi:
    """Answers lookups by ASGI messages; everything else is the server's app."""

    def __init__(self, app: App) -> None:
        self._app, self._services = app, app.services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        query = scope.get("query_string", b"")
        path = scope.get("raw_path") or b""
        route = self._services.routes.find(path + b"?" + query if query else path)
        if route is None:
            return await self._app(scope, receive, send)
        began, handler, headers = perf_counter(), self._services.handler, dict(scope["headers"])
        message = await receive()
        body = message.get("body", b"")
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        request = Request(scope["method"].encode(), route, headers, body, handler.request_id(headers), began)
        request.deadline = deadline_of(headers, began)
        answer = handler.answer(request)
        reply: Any = await answer if isawaitable(answer) else answer
        lines: list[Any] = [tuple(line.split(b": ", 1)) for line in reply.head.split(b"\r\n") if line]
        lines += [(b"content-length", b"%d" % sum(map(len, reply.body))), (b"x-request-id", request.id)]
        await send({"type": "http.response.start", "status": reply.status, "headers": lines})
        for part in reply.body:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self._services.buffers.give_back(reply.leases)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8002)
    given = parser.parse_args()
    app = PlainAsgi(create_app(Settings(store=given.store)))
    uvicorn.run(app, port=given.port, loop="uvloop", http="httptools", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
