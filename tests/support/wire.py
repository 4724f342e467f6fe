"""A server's protocol without a network: bytes in, bytes out, and how they are cut into reads is the test's choice."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from server.http.protocol import LookupProtocol

DATE = b"Mon, 30 Nov 2026 12:00:00 GMT"


class _Transport:
    """What the protocol needs of a connection; what it writes is kept."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """An encrypted connection: the protocol then writes everything here, nothing to a file descriptor."""
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2), "sslcontext": True}.get(name, default)

    def write(self, data: Any) -> None:
        """Keep a copy."""
        self.written += data

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    abort = write_eof = close

    def is_closing(self) -> bool:
        """Whether the protocol has closed it."""
        return self.closed

    def can_write_eof(self) -> bool:
        """An encrypted connection cannot be half closed."""
        return False

    def get_write_buffer_size(self) -> int:
        """The peer takes everything at once."""
        return 0

    def pause_reading(self) -> None:
        """Nothing: the test decides what is read."""

    resume_reading = pause_reading

    def set_write_buffer_limits(self, *_: Any, **__: Any) -> None:
        """No limits."""


class Wire:
    """One connection to an app in this process; use inside a running event loop."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, http=LookupProtocol, lifespan="off", log_config=None, ws="none")
        config.load()
        config.app = config.loaded_app = app
        state = ServerState()
        state.default_headers = [(b"date", DATE)]
        self.protocol = LookupProtocol(config, state, {}, asyncio.get_running_loop())
        self._transport = _Transport()
        self.protocol.connection_made(self._transport)  # type: ignore[arg-type]

    @property
    def is_closed(self) -> bool:
        """Whether the server has ended the connection."""
        return self._transport.closed

    async def send(self, *reads: bytes) -> bytes:
        """What is answered to these bytes, read in these pieces; nothing where more is needed for an answer."""
        self._transport.written.clear()
        for read in reads:
            if not self._transport.closed:
                self.protocol.data_received(read)
        for _ in range(2000):
            complete = self.protocol.arriving is None or self.protocol.arriving.complete
            if self._transport.closed or not (self.protocol._busy() and complete):
                break
            await asyncio.sleep(0.001 if _ > 20 else 0)
        return bytes(self._transport.written)


def without_times(reply: bytes) -> bytes:
    """A reply without what differs from one request to the next: durations, and request ids that the server made."""
    reply = re.sub(rb"dur=[0-9.]+", b"dur=", reply)
    masked = re.sub(rb"[0-9a-f]{8}-[0-9a-f]+", b"ID", reply)
    if masked != reply and b"application/problem+json" in reply:  # the body names the id too, whose length differs
        masked = re.sub(rb"content-length: \d+", b"content-length:", masked)
    return masked
