"""What uvicorn can do when an app does nothing: `python -m benchmarks.limit DIM` answers any body with zeros.

A body of B ids in 8 bytes each is answered as a lookup of B rows of DIM float32 would be, headers included. The address
is printed as the server prints its own.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

import uvicorn

HEADERS = [
    (b"content-type", b"application/octet-stream"),
    (b"x-embedding-dtype", b"float32"),
    (b"x-embedding-version", b"1"),
]
dim = 1
body_of = cache(bytes)


async def app(
    scope: dict[str, Any],  # noqa: ARG001
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Read the body, send as many constant bytes as a lookup would send."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    num_bytes = size // 8 * dim * 4
    headers = [*HEADERS, (b"content-length", b"%d" % num_bytes), (b"x-embedding-shape", b"%d,%d" % (size // 8, dim))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body_of(num_bytes)})


if __name__ == "__main__":
    dim = int(sys.argv[1])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    sys.stderr.write(json.dumps({"event": "listening", "address": address}) + "\n")
    sys.stderr.flush()
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False, log_level="warning"
    )
    uvicorn.Server(config).run(sockets=[listener])
