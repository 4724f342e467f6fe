"""What uvicorn can do when an app does nothing: `python -m embstore.bench.limit FACTOR` answers with constant bytes.

The reply is FACTOR times as long as the request's body. The address is printed as the server prints its own.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

BODIES: dict[int, bytes] = {}
factor = 1


async def app(
    scope: dict[str, Any],  # noqa: ARG001
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Read the body, send as many constant bytes as a lookup would send."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    size = len(body) * factor
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODIES.setdefault(size, bytes(size))})


if __name__ == "__main__":
    factor = int(sys.argv[1])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    sys.stderr.write(
        json.dumps({"event": "listening", "address": f"http://127.0.0.1:{listener.getsockname()[1]}"}) + "\n"
    )
    sys.stderr.flush()
    uvicorn.Server(config).run(sockets=[listener])
