"""What every connection of a process shares."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from server.http.admission import Admission
from server.http.buffer_pool import Buffers
from server.http.limits import Limits
from server.http.messages import Reply, Request
from server.http.outbox import Outbox
from server.http.plans import Plan, Plans
from server.http.routing import Routes
from server.metrics.recorder import Lookups


class Handler(Protocol):
    """Who answers requests: `server.api.lookup.LookupHandler`."""

    new_request_id: Callable[[], bytes]

    def answer(self, request: Request) -> Reply | Awaitable[Reply]:
        """The reply to a request, or what it will be; never raises."""

    def answer_planned(
        self, plan: Plan, request_id: bytes, body: bytes, began: float
    ) -> tuple[Reply | Awaitable[Reply], Request | None]:
        """The same for a request whose head was seen before, and the request where it was made."""

    def refuse(self, request: Request, error: Exception) -> Reply:
        """The reply to a request that ends in an error, counted."""

    def drain(self) -> None:
        """The server is on its way down: probes say so."""

    def forget(self) -> None:
        """Count a request whose client went away while it waited."""

    def request_id(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The caller's request id, or a new one."""


class Services:
    """Handler, queues, memory, limits and connections of one process."""

    def __init__(
        self,
        handler: Handler,
        admission: Admission,
        outbox: Outbox,
        buffers: Buffers,
        lookups: Lookups,
        limits: Limits,
    ) -> None:
        self.handler, self.admission, self.outbox, self.buffers = handler, admission, outbox, buffers
        self.lookups, self.limits = lookups, limits
        self.routes, self.plans = Routes(), Plans()
        self.connections: set[Any] = set()
        """Open connections, each a `server.http.protocol.LookupProtocol`."""
        self.draining = False

    def drain(self) -> None:
        """From now on probes say no, and every reply asks to close its connection."""
        self.draining = True
        self.handler.drain()
