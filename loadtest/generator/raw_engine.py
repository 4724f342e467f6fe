"""Requests as bytes over bare sockets: what a generator costs at the least. http only, bodies are not looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

from loadtest.errors import ScenarioError
from loadtest.generator.interfaces import Owner, Request
from loadtest.generator.raw_connection import RawConnection
from loadtest.workload.request_stream import RequestStream

BUFFER_BYTES = 1 << 18


class Sockets:
    """Opens connections to one address; all of them read into one buffer."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address, self.buffer = address, bytearray(BUFFER_BYTES)

    async def open(self, owner: Owner) -> None:
        """Open a connection; OSError when the server cannot be reached."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: RawConnection(owner, self.buffer), *self.address)


class RawEngine(Sockets):
    """Sends what a source makes, and checks replies by their head."""

    def __init__(self, url: str, source: RequestStream, headers: Sequence[tuple[str, str]] = ()) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.path.strip("/"):
            raise ScenarioError(f"engine raw: url must be http://HOST:PORT, got {url!r}")
        super().__init__((parts.hostname or "", parts.port or 80))
        self.host, self.source, self.headers = parts.netloc, source, headers

    def next(self, second: float) -> Request:
        """The source's next request."""
        prepared = self.source.next(second)
        return Request(prepared.wire(self.host, self.headers), prepared.kind, prepared.expect)
