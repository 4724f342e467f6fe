"""A TCP proxy between a client and Redis that does to the replies whatever a test says."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class FaultyProxy:
    """Forwards everything, until told to spoil it. A thread of its own; attributes may be set at any time.

    `delay_s`: replies come so much later. `spoil`: a function from the bytes of a reply to those that are sent instead;
    None ends the connection. `frozen`: replies are read and kept back. `refuse`: connections are ended at once.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target, self.tls = port, tls
        self.delay_s = 0.0
        self.spoil: Callable[[bytes], bytes | None] | None = None
        self.frozen = False
        self.refuse = False
        self.num_connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        """End every connection and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def heal(self) -> None:
        """Forward everything again."""
        self.delay_s, self.spoil, self.frozen, self.refuse = 0.0, None, False, False

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        redis_writer: asyncio.StreamWriter | None = None
        try:
            if self.refuse:
                return
            redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", self.target)
            await _first(self._forward(reader, redis_writer), self._answer(redis_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, redis_writer):
                if each is not None:
                    each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            writer.write(data)
            await writer.drain()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            while self.frozen:
                await asyncio.sleep(0.01)
            spoiled = self.spoil(data) if self.spoil else data
            if spoiled is None:
                return
            writer.write(spoiled)
            await writer.drain()


async def _first(*coroutines: Any) -> None:
    """Until the first of them ends; the others are cancelled."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def proxy(port: int, tls: ssl.SSLContext | None = None) -> Iterator[FaultyProxy]:
    """A proxy in front of a port, stopped at the end; clients speak TLS to it where a context is given."""
    running = FaultyProxy(port, tls)
    running.start()
    try:
        yield running
    finally:
        running.stop()
