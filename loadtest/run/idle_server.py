"""A server that does nothing: whatever is asked, it sends the replies in turn that it was given.

`python -m loadtest.run.idle_server` reads a line {"replies": [base64 of whole HTTP replies]}, prints its port and
serves on loopback until its stdin ends.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import uvloop


class Idle(asyncio.Protocol):
    """One connection: a request counts as read when its head and the bytes that it promised are there."""

    def __init__(self, replies: Iterator[bytes]) -> None:
        self.replies, self.head, self.left = replies, b"", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        while data:
            if self.left:
                self.left, data = max(0, self.left - len(data)), data[self.left :]
            else:
                head, end, data = (self.head + data).partition(b"\r\n\r\n")
                if not end:
                    self.head = head
                    return
                self.head, self.left = b"", _length(head)
            if not self.left:
                self.transport.write(next(self.replies))


def _length(head: bytes) -> int:
    """Bytes of the body."""
    _, _, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0] or 0)


async def serve(replies: list[bytes]) -> None:
    """Until stdin ends."""
    loop = asyncio.get_running_loop()
    turns = itertools.cycle(replies)
    server = await loop.create_server(lambda: Idle(turns), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.buffer.read)
    server.close()


def main() -> int:
    """Serve what the first line of stdin says."""
    replies = [base64.b64decode(reply) for reply in json.loads(sys.stdin.buffer.readline())["replies"]]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(replies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
