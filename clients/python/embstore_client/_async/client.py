"""The client for event loops: calls are tasks, under asyncio or trio."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
from numpy.typing import NDArray

from embstore_client._async.attempts import Executor
from embstore_client._async.transport import AsyncTransport
from embstore_client._core import protocol
from embstore_client._core.client_core import (
    DEFAULT_BASE_URL,
    DEFAULT_TIMEOUT_S,
    ClientCore,
    only,
    plan_ready,
    ssl_context_for,
)
from embstore_client._core.ids import Ids
from embstore_client._core.near_cache import NearCache
from embstore_client._core.observer import Observer
from embstore_client._core.options import DTYPE_DEFAULT, ON_MISSING_DEFAULT
from embstore_client._core.plan import Plan
from embstore_client._core.planner import MAX_IDS
from embstore_client._core.policies import Hedge, Retries
from embstore_client._core.query import Bags
from embstore_client._core.rows import ManyRows, Rows
from embstore_client._errors import ConnectionFailed, Timeout, Unavailable


class AsyncEmbeddingClient:
    """Looks vectors up in an embstore server from asyncio or trio: `EmbeddingClient` with every call awaited.

    Takes what `EmbeddingClient` takes; `transport` is an asynchronous one. Belongs to one event loop. A call that is
    cancelled leaves no task behind, and the connection it was on is closed.

    >>> async with AsyncEmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
    ...     (await client.lookup("item", [3, 14, 15])).vectors.shape
    (3, 64)
    """

    def __init__(
        self,
        base_url: str | Sequence[str] = DEFAULT_BASE_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        api_key: str | None = None,
        on_missing: str = ON_MISSING_DEFAULT,
        retries: Retries | None = Retries(),  # noqa: B008 - frozen
        hedge: Hedge | None = None,
        near_cache: NearCache | int | None = None,
        max_ids: int = MAX_IDS,
        observer: Observer | None = None,
        verify: bool | str | ssl.SSLContext = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._core = core = ClientCore(
            base_url,
            timeout_s=timeout_s,
            api_key=api_key,
            on_missing=on_missing,
            retries=retries,
            hedge=hedge,
            near_cache=near_cache,
            max_ids=max_ids,
            observer=observer,
        )
        network = transport or AsyncTransport(ssl_context_for(core.base_urls, verify))
        self._executor = Executor(core, network)
        core.claim_cache()

    async def lookup(
        self,
        table: str,
        ids: Ids,
        *,
        version: int | None = None,
        label: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        offsets: Sequence[int] | NDArray[Any] | None = None,
        pooling: str | None = None,
        weights: Sequence[float] | NDArray[Any] | None = None,
        timeout_s: float | None = None,
    ) -> Rows:
        """The vectors of `ids`, in their order, all from one version of `table`: see `EmbeddingClient.lookup`."""

        def plan() -> Plan[Rows]:
            return self._core.planner.lookup(
                table,
                ids,
                version=version,
                label=label,
                on_missing=on_missing,
                dtype=dtype,
                offsets=offsets,
                pooling=pooling,
                weights=weights,
            )

        return await self._executor.call("lookup", plan, timeout_s)

    async def lookup_many(
        self,
        ids_by_table: Mapping[str, Ids | Bags],
        *,
        release: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> ManyRows:
        """The vectors of several tables, all from one release: see `EmbeddingClient.lookup_many`."""

        def plan() -> Plan[ManyRows]:
            return self._core.planner.lookup_many(ids_by_table, release=release, on_missing=on_missing, dtype=dtype)

        return await self._executor.call("lookup_many", plan, timeout_s)

    async def tables(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """What is served: see `EmbeddingClient.tables`."""
        return await self._executor.call("tables", lambda: only(protocol.build_tables()), timeout_s)

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether lookups are being answered now: see `EmbeddingClient.ready`."""
        try:
            return await self._executor.call("ready", plan_ready, timeout_s, self._core.attempts_at_each_address)
        except (ConnectionFailed, Timeout, Unavailable):
            return False

    async def aclose(self) -> None:
        """Closes the connections; calls under way raise `ConnectionFailed`, the client cannot be used afterwards."""
        await self._executor.aclose()

    async def __aenter__(self) -> AsyncEmbeddingClient:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return self._core.describe("AsyncEmbeddingClient")
