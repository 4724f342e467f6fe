"""The network under the async client: httpcore's connections, a call on each."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpcore
import httpx

from embstore_client._core.connections import KEEPALIVE_S, MAX_CONNECTIONS, Idle, Place
from embstore_client._sync.transport import core_request


class AsyncTransport(httpx.AsyncBaseTransport):
    """httpx requests over kept connections. Nothing here ends in time by itself: who calls cancels."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._ssl_context = ssl_context
        self._idle: Idle[httpcore.AsyncConnectionInterface] = Idle(time.monotonic)
        self._room = anyio.Semaphore(MAX_CONNECTIONS, fast_acquire=True)
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent = core_request(request)
        place = Place.of(sent)
        request.extensions.get("timeout", {}).get("pool")  # says that it waits for a connection
        await self._room.acquire()
        connection = None
        try:
            connection = await self._take(place)
            response = await connection.handle_async_request(sent)
        except BaseException:
            await self.give_back(place, connection)
            raise
        stream = _Body(self, place, connection, response)
        return httpx.Response(response.status, headers=response.headers, stream=stream)

    async def aclose(self) -> None:
        self._closed = True
        for connection in self._idle.clear():
            await connection.aclose()

    async def _take(self, place: Place) -> httpcore.AsyncConnectionInterface:
        spoilt: list[httpcore.AsyncConnectionInterface] = []
        connection = self._idle.take(place, spoilt)
        for old in spoilt:
            await _close(old)
        if connection is not None:
            return connection
        return httpcore.AsyncHTTPConnection(
            httpcore.Origin(*place.origin), self._ssl_context, keepalive_expiry=KEEPALIVE_S, uds=place.uds
        )

    async def give_back(self, place: Place, connection: httpcore.AsyncConnectionInterface | None) -> None:
        """A call has ended, however it did."""
        self._room.release()
        if connection is not None:
            done = connection if self._closed else self._idle.put(place, connection)
            if done is not None:
                await _close(done)


class _Body(httpx.AsyncByteStream):
    def __init__(
        self,
        transport: AsyncTransport,
        place: Place,
        connection: httpcore.AsyncConnectionInterface,
        response: httpcore.Response,
    ) -> None:
        self._transport, self._place, self._response = transport, place, response
        self._connection: Any = connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.aiter_stream()

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            await self._response.aclose()
        finally:
            await self._transport.give_back(self._place, connection)


async def _close(connection: httpcore.AsyncConnectionInterface) -> None:
    """Also where the call is being cancelled."""
    with anyio.CancelScope(shield=True):
        await connection.aclose()
