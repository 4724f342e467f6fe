"""The network under the sync client: httpcore's own pool, over sockets that know the deadline of their call.

httpx's timeouts bound one read each, so a server that sends one byte of a header now and then could hold a call for
ever. Here every read and write asks what is left. A proxy of the environment is not used: pass
`transport=httpx.HTTPTransport(proxy=...)` for one.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import httpcore
import httpx

from ._deadline import Patience, Seconds

SocketOptions = Iterable[tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]]


class DeadlineTransport(httpx.BaseTransport):
    """httpx requests over a pool of connections, each call ending within its deadline."""

    def __init__(self, limits: httpx.Limits, ssl_context: ssl.SSLContext | None) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Network(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        response = self._pool.handle_request(
            httpcore.Request(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(response.status, headers=response.headers, stream=_Body(response))

    def close(self) -> None:
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


class _Network(httpcore.NetworkBackend):
    """Connections whose every wait asks what is left."""

    def __init__(self) -> None:
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of `host` that answers; they share the time, so a dead one costs its part."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # a name that IDNA cannot encode
            raise httpcore.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        for untried in range(len(addresses), 0, -1):
            left = _left(timeout, httpcore.ConnectTimeout)
            share = None if left is None else left / untried
            try:
                inner = self._inner.connect_tcp(addresses[-untried], port, share, local_address, socket_options)
                return DeadlineStream(inner, timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed


class DeadlineStream(httpcore.NetworkStream):
    """A connection whose reads and writes end with the call that it is used for."""

    def __init__(self, inner: httpcore.NetworkStream, timeout: float | None) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._patience: Patience | None = None
        self._carries(timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of `buffer`: piece by piece, for a server that reads slowly may not stretch the call."""
        self._carries(timeout)
        connection, unsent = self._inner.get_extra_info("socket"), memoryview(buffer)
        try:
            while unsent:
                connection.settimeout(_left(timeout, httpcore.WriteTimeout))
                unsent = unsent[connection.send(unsent) :]
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            inner = self._inner.start_tls(ssl_context, server_hostname, _left(timeout, httpcore.ConnectTimeout))
        except BaseException:
            self.close()
            raise
        return DeadlineStream(inner, timeout)

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def abort(self, patience: Patience) -> None:
        """Wake the thread that reads or writes here for `patience`; the connection is then closed, not reused."""
        with self._lock:  # by now it may carry another call
            if self._patience is patience:
                with suppress(OSError):  # an `SSLSocket`'s own shutdown would have that thread go on without TLS
                    socket.socket.shutdown(self._inner.get_extra_info("socket"), socket.SHUT_RDWR)

    def _carries(self, timeout: float | None) -> None:
        patience = timeout.patience if isinstance(timeout, Seconds) else None
        if patience is self._patience:
            return
        with self._lock:
            self._patience = patience
        if patience is not None:
            patience.travels_on(self)


def _left(timeout: float | None, late: type[Exception]) -> float | None:
    """What remains now of a timeout that was given out earlier; raises `late` where nothing does."""
    if not isinstance(timeout, Seconds):
        return timeout
    left = timeout.left()
    if left <= 0:
        raise late("the time is over")
    return left
