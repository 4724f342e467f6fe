"""Connections that wait for a call. One that is wanted is found at once, however many there are.

httpx's pool looks at all of its connections for every request, and once more at all of them for each that is idle: with
a hundred of them that is milliseconds a request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import httpcore
import httpx

# Idle connections go after 30 s, before the server (75 s) or a proxy (often 60 s) closes its side: a call sent
# into that closing would fail.
KEEPALIVE_S = 30.0
MAX_CONNECTIONS = 100
"""Most calls that travel at once, over all addresses; so there are never more connections to one of them."""
NO_ROOM = f"all {MAX_CONNECTIONS} connections of this client were in use"


class Endpoint(NamedTuple):
    """Where a connection leads to: an origin, reached over TCP, or over the Unix-domain socket `uds`."""

    origin: tuple[bytes, bytes, int]
    uds: str | None

    @staticmethod
    def of(request: httpcore.Request) -> Endpoint:
        """Where a request is to go."""
        origin = request.url.origin
        return Endpoint((origin.scheme, origin.host, origin.port), request.extensions.get("uds"))


class Connection(Protocol):
    """What httpcore's connections say of themselves."""

    def is_available(self) -> bool: ...

    def has_expired(self) -> bool: ...


C = TypeVar("C", bound=Connection)


class IdleConnections(Generic[C]):
    """Stacks of connections, one for each place: the one used last is used next, so those too many grow old.

    Any thread may call: each step is one operation on a list.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._stacks: dict[Endpoint, list[tuple[float, C]]] = {}

    def take(self, endpoint: Endpoint, spoilt: list[C]) -> C | None:
        """A connection to use, None where there is none; what can be used no more goes to `spoilt`, to be closed."""
        stack = self._stacks.get(endpoint)
        while stack:
            try:
                _, connection = stack.pop()
            except IndexError:  # another thread was quicker
                break
            if connection.is_available() and not connection.has_expired():
                return connection
            spoilt.append(connection)
        return None

    def put(self, endpoint: Endpoint, connection: C) -> C | None:
        """Keep a connection whose call has ended. One that is to be closed comes back: it, or one that grew old."""
        if not connection.is_available():
            return connection
        stack = self._stacks.setdefault(endpoint, [])
        now = self._clock()
        stack.append((now, connection))
        if stack[0][0] < now - KEEPALIVE_S:
            return stack.pop(0)[1]
        return None

    def clear(self) -> list[C]:
        """All of them, to be closed."""
        stacks, self._stacks = self._stacks, {}
        return [connection for stack in stacks.values() for _, connection in stack]


def core_request(request: httpx.Request) -> httpcore.Request:
    """The same for httpcore."""
    url = request.url
    return httpcore.Request(
        request.method,
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )
