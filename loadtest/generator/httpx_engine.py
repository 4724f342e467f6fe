"""Requests by httpx: what its users' programs do, without what they could leave out.

Each caller has a transport of its own with one connection: httpx's pool looks at all of its connections for every
request, which with many connections takes longer than the request. Cookies, redirects and the reading of proxies'
settings, which AsyncClient adds, are left out with AsyncClient; timeouts are those of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Sequence
from functools import lru_cache

import httpx

from loadtest.generator.interfaces import InFlight, Owner, Request, Version
from loadtest.generator.loops import RECONNECT_SECONDS
from loadtest.scenario.target import causes, is_tls
from loadtest.workload.request_stream import RequestStream

ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
PROBE = "/livez"
"""Asked once by each caller, so that its connection is open when the load begins; any answer will do."""


class HttpxEngine:
    """Sends what a source makes, and checks every reply whole."""

    def __init__(
        self, url: str, source: RequestStream, headers: Sequence[tuple[str, str]], context: ssl.SSLContext
    ) -> None:
        self.source, self.headers, self.base = source, list(headers), url.rstrip("/")
        self.context = context
        self.url_of = lru_cache(4096)(lambda target: httpx.URL(self.base + target))

    def next(self, second: float) -> Request:
        """The source's next request."""
        prepared = self.source.next(second)
        headers = [*prepared.headers, *self.headers]
        sent = httpx.Request(prepared.method, self.url_of(prepared.target), headers=headers, content=prepared.body)
        return Request(sent, prepared.kind, prepared.expect)

    def transport(self) -> httpx.AsyncHTTPTransport:
        """One connection, not yet open."""
        return httpx.AsyncHTTPTransport(verify=self.context, limits=ONE, trust_env=False)

    async def open(self, owner: Owner) -> None:
        """Open a connection; OSError when the server cannot be reached."""
        connection = HttpxConnection(self, owner)
        try:
            await connection.exchange(httpx.Request("GET", self.url_of(PROBE), headers=self.headers))
        except httpx.TransportError as error:
            raise OSError(str(error) or type(error).__name__) from error
        owner.made(connection)


class HttpxConnection:
    """One caller: a transport, and a task while it waits for a reply."""

    def __init__(self, engine: HttpxEngine, owner: Owner) -> None:
        self.engine, self.owner = engine, owner
        self.in_flight: InFlight | None = None
        self.transport = engine.transport()
        self.task: asyncio.Task[None] | None = None
        self.stream: object = None
        self.closed = False

    def usable(self) -> bool:
        """Whether it waits for nothing."""
        return self.task is None and not self.closed

    def send(self, in_flight: InFlight) -> None:
        """Send a request; the connection must be usable."""
        self.in_flight, in_flight.sent = in_flight, time.perf_counter_ns()
        self.task = asyncio.get_running_loop().create_task(self._ask(in_flight))
        self.task.add_done_callback(self._asked)

    def _asked(self, task: asyncio.Task[None]) -> None:  # noqa: ARG002
        """Usable again. Not the end of `_ask`: a task that is cancelled before its first step has none."""
        if not self.closed:
            self.task = None
            self.owner.ready(self)

    async def exchange(self, request: httpx.Request) -> tuple[httpx.Response, bytes, int]:
        """A request's whole reply, and when it was there."""
        response = await self.transport.handle_async_request(request)
        try:
            pieces = [piece async for piece in response.stream]  # type: ignore[union-attr]
            done = time.perf_counter_ns()
        finally:
            await response.aclose()
        stream = response.extensions.get("network_stream")
        if stream is not self.stream:
            if self.stream is not None:
                self.owner.reconnected()
            self.stream = stream
        return response, pieces[0] if len(pieces) == 1 else b"".join(pieces), done

    async def _ask(self, in_flight: InFlight) -> None:
        pause = 0.0
        try:
            response, body, in_flight.done = await self.exchange(in_flight.request.payload)
            self.in_flight = None
            self._replied(in_flight, response, body)
        except asyncio.CancelledError:
            await self._begin_anew()  # given up by `fail` or `close`, which has counted it
        except (httpx.TransportError, httpx.DecodingError, OSError) as error:
            self._give_up(kind := kind_of(error))
            pause = RECONNECT_SECONDS if kind in ("connect", "tls") else 0.0
        except Exception as error:
            self._give_up("protocol")
            self.owner.broken(error)
        if pause:
            await asyncio.sleep(pause)

    def _replied(self, in_flight: InFlight, response: httpx.Response, body: bytes) -> None:
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers.raw}
        status, expect = response.status_code, in_flight.request.expect
        problem: str | None = None
        version: Version | None = None
        if expect is not None and 200 <= status < 300:
            problem = expect.problem(status, headers, body)
            version = expect.version(headers, body)
        self.owner.replied(in_flight, status, len(body), "retry-after" in headers, problem, version)

    async def _begin_anew(self) -> None:
        with contextlib.suppress(Exception):  # it may be in the middle of anything
            await self.transport.aclose()
        self.transport = self.engine.transport()

    def fail(self, kind: str) -> None:
        """Give the request up, and the connection with it."""
        if self.in_flight is not None and self.task is not None:
            self._give_up(kind)
            self.task.cancel()

    def _give_up(self, kind: str) -> None:
        if self.in_flight is not None:
            in_flight, self.in_flight = self.in_flight, None
            self.owner.failed(in_flight, kind)

    def close(self) -> None:
        """Leave nothing open; the owner hears of it when it is lost."""
        self.closed = True
        if self.task is not None:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self._end(self.task))

    async def _end(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            await asyncio.wait([task], timeout=1)
        with contextlib.suppress(Exception):
            await self.transport.aclose()
        self.owner.lost(self, answered=True)


def kind_of(error: Exception) -> str:
    """What Tally calls it."""
    said = str(error)
    if is_tls(error):
        return "tls"
    if isinstance(error, httpx.ConnectError):
        return "connect"
    if isinstance(error, httpx.RemoteProtocolError):
        if "complete message body" in said or "incomplete chunked read" in said:
            return "truncated"
        return "closed" if "disconnected" in said else "protocol"
    if isinstance(error, httpx.NetworkError) or any(isinstance(one, OSError) for one in causes(error)):
        return "reset"
    return "protocol"
