"""The client for threads: calls over blocking sockets."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import httpx
from numpy.typing import NDArray

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
from embstore_client._sync.attempts import Executor
from embstore_client._sync.transport import DeadlineTransport


class EmbeddingClient:
    """Looks vectors up in an embstore server; safe to share between threads, best made once a process.

    Args:
        base_url: where the server is, `http://` or `https://`, a path prefix is kept; or `unix:///run/embstore.sock`,
            the absolute path of its socket. Several addresses of the same service are balanced over; those that fail
            are left alone for a while.
        timeout_s: for a whole call, connecting and retries included; each call may override it.
            The server is told what is left, and drops work that is late.
        api_key: sent as `Authorization: Bearer ...`.
        on_missing: what an id that the table does not know gets, unless the call says otherwise:
            `"zero"`, `"default"`, `"hash"`, or `"error"` to raise `IdOutOfRange`.
        retries: what is sent again and how often; None to send everything once.
        hedge: when a slow request is sent a second time; None for never. Hedged calls travel in worker threads.
        near_cache: bytes of memory for the vectors of hot ids, or a `NearCache` of this client's own; None for none.
        max_ids: a call with more is split into several requests, sent at the same time.
        observer: hooks for metrics and tracing.
        verify: how `https://` certificates are checked: True (public roots), a file of roots, or an SSL context.
        transport: an httpx transport instead of the network (tests, a proxy).

    Raises:
        ValueError: an argument that no call could work with.

    >>> with EmbeddingClient("http://127.0.0.1:8000") as client:      # doctest: +SKIP
    ...     client.lookup("item", [3, 14, 15]).vectors.shape
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
        transport: httpx.BaseTransport | None = None,
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
        self._executor = Executor(core, transport or DeadlineTransport(ssl_context_for(core.base_urls, verify)))
        core.claim_cache()

    def lookup(
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
        """The vectors of `ids`, in their order, all from one version of `table`.

        Args:
            table: the table's name.
            ids: `[n]` integers (of any integer dtype, within int64), or `[n]` string keys; n may be 0.
            version: this version exactly; or
            label: the version a label names (`"stable"`). Without either: `"latest"`.
            on_missing: overrides the client's.
            dtype: `"float32"`; `"float16"` or `"bfloat16"` for half the bytes; `"int8"` for a quarter.
            offsets: `[g]` where each bag starts in `ids`, the first at 0: one pooled vector a bag instead of one an id.
            pooling: `"sum"`, `"mean"` (the default) or `"max"` of a bag's vectors.
            weights: `[n]`, a factor for each id; not with `"max"`.
            timeout_s: overrides the client's.

        Returns:
            `Rows`: `.vectors` `[n, d]` (`[g, d]` with `offsets`) of `dtype`, read-only, not copied; `.found` bool;
            `.version`.

        Raises:
            TypeError, ValueError: ids or options that no server could answer; nothing was sent.
            TableNotFound, VersionNotFound, LabelNotFound: nothing of that name is served.
            IdOutOfRange: an unknown id, under `on_missing="error"`.
            TooLarge, Overloaded, Unavailable, DeadlineExceeded, ServiceError: the server said no.
            ConnectionFailed, Timeout: no answer, or not in time.
            ProtocolError: an answer that is truncated or mislabelled; its vectors are never returned.
        """

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

        return self._executor.call("lookup", plan, timeout_s)

    def lookup_many(
        self,
        ids_by_table: Mapping[str, Ids | Bags],
        *,
        release: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        timeout_s: float | None = None,
    ) -> ManyRows:
        """The vectors of several tables, all from one release: `many["user"].vectors`, `many.release`.

        Args:
            ids_by_table: table name -> ids, each as in `lookup`, or `Bags`; at least one table.
            release: this release exactly; without it, the server's present one.
            on_missing, timeout_s: as in `lookup`.
            dtype: as in `lookup`, but for `"int8"`.

        Returns:
            `ManyRows`, a mapping of table name -> `Rows`. float32 and float16 travel as bytes, bfloat16 as JSON.

        Raises:
            ReleaseNotFound: no such release is served.
            Everything that `lookup` raises, for the whole call.
        """

        def plan() -> Plan[ManyRows]:
            return self._core.planner.lookup_many(ids_by_table, release=release, on_missing=on_missing, dtype=dtype)

        return self._executor.call("lookup_many", plan, timeout_s)

    def tables(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """What is served: one dict a table, as the server describes it.

        Raises:
            ServiceError, ConnectionFailed, Timeout, ProtocolError: as in `lookup`.
        """
        return self._executor.call("tables", lambda: only(protocol.build_tables()), timeout_s)

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether lookups are being answered now, at one address at least; False too where nobody answers at all.

        Raises:
            ServiceError, ProtocolError: something answers under `base_url`, but not an embstore.
        """
        try:
            return self._executor.call("ready", plan_ready, timeout_s, self._core.attempts_at_each_address)
        except (ConnectionFailed, Timeout, Unavailable):
            return False

    def close(self) -> None:
        """Closes the connections; calls under way raise `ConnectionFailed`, the client cannot be used afterwards."""
        self._executor.close()

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return self._core.describe("EmbeddingClient")
