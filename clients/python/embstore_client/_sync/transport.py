"""The network under the sync client: httpcore's connections, over sockets that know the deadline of their call.

httpx's timeouts bound one read each, so a server that sends one byte of a header now and then could hold a call for
ever. Here every read and write asks what is left. A proxy of the environment is not used: pass
`transport=httpx.HTTPTransport(proxy=...)` for one.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import httpcore
import httpx

from embstore_client._core.connections import (
    KEEPALIVE_S,
    MAX_CONNECTIONS,
    NO_ROOM,
    Endpoint,
    IdleConnections,
    core_request,
)
from embstore_client._core.deadline import AttemptTimeouts, PhaseTimeout

SocketOptions = Iterable[tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]]


class DeadlineTransport(httpx.BaseTransport):
    """httpx requests over kept connections, each call ending within its deadline."""

    def __init__(self, ssl_context: ssl.SSLContext | None) -> None:
        self._ssl_context, self._network = ssl_context, _Network()
        self._idle: IdleConnections[httpcore.ConnectionInterface] = IdleConnections(time.monotonic)
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        self._closed = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = core_request(request)
        endpoint = Endpoint.of(sent)
        wait = _left(request.extensions.get("timeout", {}).get("pool"), httpcore.PoolTimeout)
        if not self._room.acquire(timeout=wait):
            raise httpcore.PoolTimeout(NO_ROOM)
        connection = None
        try:
            connection = self._take(endpoint)
            response = connection.handle_request(sent)
        except BaseException:
            self._give_back(endpoint, connection)
            raise
        stream = _Body(response, partial(self._give_back, endpoint, connection))
        return httpx.Response(response.status, headers=response.headers, stream=stream)

    def close(self) -> None:
        self._closed = True
        for connection in self._idle.clear():
            connection.close()

    def _take(self, endpoint: Endpoint) -> httpcore.ConnectionInterface:
        spoilt: list[httpcore.ConnectionInterface] = []
        connection = self._idle.take(endpoint, spoilt)
        for old in spoilt:
            old.close()
        if connection is not None:
            return connection
        return httpcore.HTTPConnection(
            httpcore.Origin(*endpoint.origin),
            self._ssl_context,
            keepalive_expiry=KEEPALIVE_S,
            uds=endpoint.uds,
            network_backend=self._network,
        )

    def _give_back(self, endpoint: Endpoint, connection: httpcore.ConnectionInterface | None) -> None:
        """A call has ended, however it did."""
        self._room.release()
        if connection is not None:
            done = connection if self._closed else self._idle.put(endpoint, connection)
            if done is not None:
                done.close()
        if self._closed:  # meanwhile
            self.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response, ended: Callable[[], None]) -> None:
        self._response, self._ended = response, ended

    def __iter__(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    def close(self) -> None:
        ended, self._ended = self._ended, _nothing
        try:
            self._response.close()
        finally:
            ended()


def _nothing() -> None:
    """Nothing is left to do."""


class _Network(httpcore.NetworkBackend):
    """Connections whose every wait asks what is left; httpcore's own leave a socket open that could not connect."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002
        socket_options: SocketOptions | None = None,  # noqa: ARG002
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
                with _errors_as(httpcore.ConnectTimeout, httpcore.ConnectError):
                    connection = socket.create_connection((addresses[-untried], port), share)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return DeadlineStream(connection, timeout)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failed = error
        raise failed

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: SocketOptions | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        stream = DeadlineStream(socket.socket(socket.AF_UNIX), timeout)
        stream.connect(path, timeout)
        return stream


class DeadlineStream(httpcore.NetworkStream):
    """A connection whose reads and writes end with the call that it is used for."""

    def __init__(self, connection: socket.socket, timeout: float | None) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._timeouts: AttemptTimeouts | None = None
        self._carries(timeout)

    def connect(self, path: str, timeout: float | None) -> None:
        """Connect a Unix-domain socket."""
        try:
            with _errors_as(httpcore.ConnectTimeout, httpcore.ConnectError):
                self._connection.settimeout(_left(timeout, httpcore.ConnectTimeout))
                self._connection.connect(path)
        except BaseException:
            self.close()
            raise

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _errors_as(httpcore.ReadTimeout, httpcore.ReadError):
            self._connection.settimeout(_left(timeout, httpcore.ReadTimeout))
            return self._connection.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of `buffer`: piece by piece, for a server that reads slowly may not stretch the call."""
        self._carries(timeout)
        unsent = memoryview(buffer)
        with _errors_as(httpcore.WriteTimeout, httpcore.WriteError):
            while unsent:
                self._connection.settimeout(_left(timeout, httpcore.WriteTimeout))
                unsent = unsent[self._connection.send(unsent) :]

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            with _errors_as(httpcore.ConnectTimeout, httpcore.ConnectError):
                self._connection.settimeout(_left(timeout, httpcore.ConnectTimeout))
                secured = ssl_context.wrap_socket(self._connection, server_hostname=server_hostname)
        except BaseException:
            self.close()
            raise
        return DeadlineStream(secured, timeout)

    def close(self) -> None:
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        """What httpcore asks: whether TLS chose a protocol, whether an idle connection was hung up on."""
        if info == "is_readable":
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(0))
        is_tls = isinstance(self._connection, ssl.SSLSocket)
        return self._connection if info == "socket" or (info == "ssl_object" and is_tls) else None

    def abort(self, timeouts: AttemptTimeouts) -> None:
        """Wake the thread that reads or writes here for `timeouts`; the connection is then closed, not reused."""
        with self._lock:  # by now it may carry another call
            if self._timeouts is timeouts:
                with suppress(OSError):  # an `SSLSocket`'s own shutdown would have that thread go on without TLS
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def _carries(self, timeout: float | None) -> None:
        timeouts = timeout.timeouts if isinstance(timeout, PhaseTimeout) else None
        if timeouts is self._timeouts:
            return
        with self._lock:
            self._timeouts = timeouts
        if timeouts is not None:
            timeouts.attach(self)


@contextmanager
def _errors_as(late: type[Exception], failed: type[Exception]) -> Iterator[None]:
    """Errors of a socket as httpcore's."""
    try:
        yield
    except TimeoutError as error:
        raise late(str(error)) from error
    except OSError as error:
        raise failed(str(error)) from error


def _left(timeout: float | None, late: type[Exception]) -> float | None:
    """What remains now of a timeout that was given out earlier; raises `late` where nothing does."""
    if not isinstance(timeout, PhaseTimeout):
        return timeout
    left = timeout.left()
    if left <= 0:
        raise late("the time is over")
    return left
