"""The two clients: thin shells that carry `_protocol`'s bytes over httpx.

What to send and how to read the answer is not decided here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, TypeVar

import httpx

from . import _protocol
from ._deadline import Deadline
from ._errors import ConnectionFailed, ProtocolError, Timeout
from ._ids import Ids
from ._options import DTYPE_DEFAULT, ON_MISSING_DEFAULT, check_on_missing
from ._protocol import Reply, Request
from ._rows import ManyRows, Rows
from ._version import __version__

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 1.0
LONGEST_TIMEOUT_S = 86_400.0

# Idle connections go after 30 s, before the server (75 s) or a proxy (often 60 s) closes its side: a call sent
# into that closing would fail.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=30.0)


class _Shared:
    """What both clients know and do without IO: settings, `Request` to httpx, its errors to ours."""

    def __init__(
        self,
        base_url: str,
        timeout_s: float,
        api_key: str | None,
        on_missing: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_on_missing(on_missing)
        self.base_url = base = _check_base_url(base_url)
        self.timeout_s = _check_timeout(timeout_s)
        self.on_missing = on_missing
        self.clock = clock
        # Parsing a URL costs more than the rest of building a request, and a caller has few targets.
        self.url = lru_cache(maxsize=256)(lambda target: httpx.URL(base + target))
        self.headers = (
            ("user-agent", f"embstore-client/{__version__}"),
            ("accept-encoding", "identity"),  # floats do not compress, and decompressing is a copy
            *((("authorization", f"Bearer {_check_api_key(api_key)}"),) if api_key is not None else ()),
        )

    def deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self.timeout_s if timeout_s is None else _check_timeout(timeout_s), self.clock)

    def http_request(self, request: Request[T], deadline: Deadline) -> httpx.Request:
        timeout_ms = math.ceil(deadline.timeout_s * 1000)
        return httpx.Request(
            request.method,
            self.url(request.target),
            headers=[*self.headers, *request.headers, ("x-request-timeout-ms", str(timeout_ms))],
            content=request.body,
            extensions={"timeout": deadline},
        )

    @contextmanager
    def translated(self, deadline: Deadline) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            timeout_s = deadline.timeout_s
            message = f"no whole answer from {self.base_url} within {timeout_s:g} s"
            raise Timeout(message, timeout_s=timeout_s) from error
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise ConnectionFailed(f"no whole answer from {self.base_url}: {why}") from error
        except httpx.DecodingError as error:
            raise ProtocolError(f"the answer from {self.base_url} cannot be decoded: {error}") from error


class EmbeddingClient:
    """Looks vectors up in an embstore server; safe to share between threads, best made once a process.

    Args:
        base_url: where the server is, `http://` or `https://`; a path prefix is kept.
        timeout_s: for a whole call, connecting included; each call may override it.
            The server is told, and drops work that is late.
        api_key: sent as `Authorization: Bearer ...`.
        on_missing: what an id that the table does not know gets, unless the call says otherwise:
            `"zero"`, `"default"`, `"hash"`, or `"error"` to raise `IdOutOfRange`.
        transport: an httpx transport instead of the network (tests, unix sockets, own TLS settings).

    Raises:
        ValueError: an argument that no call could work with.

    >>> with EmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
    ...     client.lookup("item", [3, 14, 15]).vectors.shape
    (3, 64)
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        on_missing: str = ON_MISSING_DEFAULT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._shared = _Shared(base_url, timeout_s, api_key, on_missing)
        self._http = httpx.Client(transport=transport, limits=LIMITS)

    def lookup(
        self,
        table: str,
        ids: Ids,
        *,
        version: int | None = None,
        label: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> Rows:
        """The vectors of `ids`, in their order, all from one version of `table`.

        Args:
            table: the table's name.
            ids: `[n]` integers (of any integer dtype, within int64), or `[n]` string keys; n may be 0.
            version: this version exactly; or
            label: the version a label names (`"stable"`). Without either: `"latest"`.
            on_missing: overrides the client's.
            dtype: `"float32"`, or `"float16"` for half the bytes.
            timeout_s: overrides the client's.

        Returns:
            `Rows`: `.vectors` `[n, d]` of `dtype`, read-only, not copied; `.found` bool `[n]`; `.version`.

        Raises:
            TypeError, ValueError: ids or options that no server could answer; nothing was sent.
            TableNotFound, VersionNotFound, LabelNotFound: nothing of that name is served.
            IdOutOfRange: an unknown id, under `on_missing="error"`.
            TooLarge, Overloaded, Unavailable, DeadlineExceeded, ServiceError: the server said no.
            ConnectionFailed, Timeout: no answer, or not in time.
            ProtocolError: an answer that is truncated or mislabelled; its vectors are never returned.
        """
        on_missing = self._shared.on_missing if on_missing is None else on_missing
        request = _protocol.build_lookup(table, ids, version=version, label=label, on_missing=on_missing, dtype=dtype)
        return self._call(request, timeout_s)

    def lookup_many(
        self,
        ids_by_table: Mapping[str, Ids],
        *,
        release: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> ManyRows:
        """The vectors of several tables, all from one release: `many["user"].vectors`, `many.release`.

        Args:
            ids_by_table: table name -> ids, each as in `lookup`; at least one table.
            release: this release exactly; without it, the server's present one.
            on_missing, dtype, timeout_s: as in `lookup`.

        Returns:
            `ManyRows`, a mapping of table name -> `Rows`. The rows travel as JSON, so each array is its own.

        Raises:
            ReleaseNotFound: no such release is served.
            Everything that `lookup` raises, for the whole call.
        """
        on_missing = self._shared.on_missing if on_missing is None else on_missing
        request = _protocol.build_lookup_many(ids_by_table, release=release, on_missing=on_missing, dtype=dtype)
        return self._call(request, timeout_s)

    def tables(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """What is served: one dict a table, as the server describes it.

        Raises:
            ServiceError, ConnectionFailed, Timeout, ProtocolError: as in `lookup`.
        """
        return self._call(_protocol.build_tables(), timeout_s)

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether lookups are being answered now; False too where nobody answers at all.

        Raises:
            ServiceError, ProtocolError: something answers under `base_url`, but not an embstore.
        """
        try:
            return self._call(_protocol.build_ready(), timeout_s)
        except (ConnectionFailed, Timeout):
            return False

    def close(self) -> None:
        """Closes the connections; the client cannot be used afterwards."""
        self._http.close()

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddingClient({self._shared.base_url!r}, timeout_s={self._shared.timeout_s:g})"

    def _call(self, request: Request[T], timeout_s: float | None) -> T:
        deadline = self._shared.deadline(timeout_s)
        chunks = []
        with self._shared.translated(deadline):
            response = self._http.send(self._shared.http_request(request, deadline), stream=True)
            try:
                for chunk in response.iter_bytes():
                    deadline.check()
                    chunks.append(chunk)
            finally:
                response.close()
        headers = _protocol.fold_headers(response.headers.raw)
        return request.parse(Reply(response.status_code, headers, b"".join(chunks)))


class AsyncEmbeddingClient:
    """Looks vectors up in an embstore server from asyncio or trio: `EmbeddingClient` with every call awaited.

    Takes what `EmbeddingClient` takes; `transport` is an asynchronous one. Belongs to one event loop.

    >>> async with AsyncEmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
    ...     (await client.lookup("item", [3, 14, 15])).vectors.shape
    (3, 64)
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        on_missing: str = ON_MISSING_DEFAULT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._shared = _Shared(base_url, timeout_s, api_key, on_missing)
        self._http = httpx.AsyncClient(transport=transport, limits=LIMITS)

    async def lookup(
        self,
        table: str,
        ids: Ids,
        *,
        version: int | None = None,
        label: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> Rows:
        """The vectors of `ids`, `[n, d]` of `dtype` and in their order, all from one version of `table`.

        Takes, returns and raises what `EmbeddingClient.lookup` does.
        """
        on_missing = self._shared.on_missing if on_missing is None else on_missing
        request = _protocol.build_lookup(table, ids, version=version, label=label, on_missing=on_missing, dtype=dtype)
        return await self._call(request, timeout_s)

    async def lookup_many(
        self,
        ids_by_table: Mapping[str, Ids],
        *,
        release: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> ManyRows:
        """The vectors of several tables, all from one release: `many["user"].vectors`, `many.release`.

        Takes, returns and raises what `EmbeddingClient.lookup_many` does.
        """
        on_missing = self._shared.on_missing if on_missing is None else on_missing
        request = _protocol.build_lookup_many(ids_by_table, release=release, on_missing=on_missing, dtype=dtype)
        return await self._call(request, timeout_s)

    async def tables(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """What is served: one dict a table, as the server describes it.

        Raises:
            ServiceError, ConnectionFailed, Timeout, ProtocolError: as in `lookup`.
        """
        return await self._call(_protocol.build_tables(), timeout_s)

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether lookups are being answered now; False too where nobody answers at all.

        Raises:
            ServiceError, ProtocolError: something answers under `base_url`, but not an embstore.
        """
        try:
            return await self._call(_protocol.build_ready(), timeout_s)
        except (ConnectionFailed, Timeout):
            return False

    async def aclose(self) -> None:
        """Closes the connections; the client cannot be used afterwards."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncEmbeddingClient:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncEmbeddingClient({self._shared.base_url!r}, timeout_s={self._shared.timeout_s:g})"

    async def _call(self, request: Request[T], timeout_s: float | None) -> T:
        deadline = self._shared.deadline(timeout_s)
        chunks = []
        with self._shared.translated(deadline):
            response = await self._http.send(self._shared.http_request(request, deadline), stream=True)
            try:
                async for chunk in response.aiter_bytes():
                    deadline.check()
                    chunks.append(chunk)
            finally:
                await response.aclose()
        headers = _protocol.fold_headers(response.headers.raw)
        return request.parse(Reply(response.status_code, headers, b"".join(chunks)))


def _check_base_url(base_url: str) -> str:
    """The URL without its last slash; credentials would reach logs and messages, so it must have none."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(f"base_url is not a URL: {error}") from error
    if url.userinfo:
        raise ValueError("base_url must not hold credentials; pass api_key=")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"base_url must start with http:// or https:// and name a host, got {base_url!r}")
    if url.query or url.fragment:
        raise ValueError(f"base_url must end with its path, without ? or #, got {base_url!r}")
    return str(url).rstrip("/")


def _check_timeout(timeout_s: float) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout_s must be seconds, a number above 0, got {timeout_s!r}")
    if not 0 < timeout_s <= LONGEST_TIMEOUT_S:
        raise ValueError(f"timeout_s must be above 0 and at most {LONGEST_TIMEOUT_S:g} s, got {timeout_s}")
    return float(timeout_s)


def _check_api_key(api_key: str) -> str:
    """The key, if it can stand in a header; the message must not repeat it."""
    if not api_key or not all("!" <= char <= "~" for char in api_key):
        raise ValueError("api_key must be printable ASCII without spaces, and not empty")
    return api_key
