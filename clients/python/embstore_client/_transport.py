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

from ._deadline import Patience, Seconds, left_of

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
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
        for i, address in enumerate(addresses[:-1]):
            share = None if timeout is None else timeout / (len(addresses) - i)
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return self._connect(address, port, share, local_address, socket_options, timeout)
        return self._connect(addresses[-1], port, timeout, local_address, socket_options, timeout)

    def _connect(
        self,
        address: str,
        port: int,
        seconds: float | None,
        local_address: str | None,
        socket_options: SocketOptions | None,
        timeout: float | None,
    ) -> httpcore.NetworkStream:
        left = left_of(timeout)
        if seconds is not None and left is not None:
            seconds = min(seconds, left)
        return DeadlineStream(self._inner.connect_tcp(address, port, seconds, local_address, socket_options), timeout)


class DeadlineStream(httpcore.NetworkStream):
    """A connection whose reads and writes end with the call that it is used for."""

    def __init__(self, inner: httpcore.NetworkStream, timeout: float | None) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._patience: Patience | None = None
        self._carries(timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, left_of(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._carries(timeout)
        self._inner.write(buffer, left_of(timeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, left_of(timeout))
        return DeadlineStream(inner, timeout)

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def abort(self, patience: Patience) -> None:
        """Wake the thread that reads or writes here for `patience`; the connection is then closed, not reused."""
        with self._lock:  # by now it may carry another call
            if self._patience is patience:
                with suppress(OSError):
                    self._inner.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def _carries(self, timeout: float | None) -> None:
        patience = timeout.patience if isinstance(timeout, Seconds) else None
        if patience is self._patience:
            return
        with self._lock:
            self._patience = patience
        if patience is not None:
            patience.travels_on(self)
