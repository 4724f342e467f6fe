"""The network under the async client: httpcore's connections, a call on each."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpcore
import httpx

from embstore_client._core.connections import KEEPALIVE_S, MAX_CONNECTIONS, Endpoint, IdleConnections, core_request


class AsyncTransport(httpx.AsyncBaseTransport):
    """httpx requests over kept connections. Nothing here ends in time by itself: who calls cancels."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._ssl_context = ssl_context
        self._idle: IdleConnections[httpcore.AsyncConnectionInterface] = IdleConnections(time.monotonic)
        self._room = anyio.Semaphore(MAX_CONNECTIONS, fast_acquire=True)
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        sent = core_request(request)
        endpoint = Endpoint.of(sent)
        request.extensions.get("timeout", {}).get("pool")  # says that it waits for a connection
        await self._room.acquire()
        connection = None
        try:
            connection = await self._take(endpoint)
            response = await connection.handle_async_request(sent)
        except BaseException:
            await self.give_back(endpoint, connection)
            raise
        stream = _Body(self, endpoint, connection, response)
        return httpx.Response(response.status, headers=response.headers, stream=stream)

    async def aclose(self) -> None:
        self._closed = True
        for connection in self._idle.clear():
            await connection.aclose()

    async def _take(self, endpoint: Endpoint) -> httpcore.AsyncConnectionInterface:
        spoilt: list[httpcore.AsyncConnectionInterface] = []
        connection = self._idle.take(endpoint, spoilt)
        for old in spoilt:
            await _close(old)
        if connection is not None:
            return connection
        return httpcore.AsyncHTTPConnection(
            httpcore.Origin(*endpoint.origin), self._ssl_context, keepalive_expiry=KEEPALIVE_S, uds=endpoint.uds
        )

    async def give_back(self, endpoint: Endpoint, connection: httpcore.AsyncConnectionInterface | None) -> None:
        """A call has ended, however it did."""
        self._room.release()
        if connection is not None:
            done = connection if self._closed else self._idle.put(endpoint, connection)
            if done is not None:
                await _close(done)


class _Body(httpx.AsyncByteStream):
    def __init__(
        self,
        transport: AsyncTransport,
        endpoint: Endpoint,
        connection: httpcore.AsyncConnectionInterface,
        response: httpcore.Response,
    ) -> None:
        self._transport, self._endpoint, self._response = transport, endpoint, response
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
            await self._transport.give_back(self._endpoint, connection)


async def _close(connection: httpcore.AsyncConnectionInterface) -> None:
    """Also where the call is being cancelled."""
    with anyio.CancelScope(shield=True):
        await connection.aclose()
