"""The requests that a call takes. No IO: the executors send them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from embstore_client._core.ids import Ids
from embstore_client._core.near_cache import NearCache
from embstore_client._core.options import (
    DTYPE_DEFAULT,
    ON_MISSING_DEFAULT,
    check_dtype,
    check_on_missing,
    segment,
)
from embstore_client._core.plan import Plan, the_only_answer
from embstore_client._core.query import Bags, bags_of_call, query_of
from embstore_client._core.release_lookup import ReleaseLookup
from embstore_client._core.rows import ManyRows, Rows
from embstore_client._core.table_lookup import TableLookup
from embstore_client._errors import TooLarge, TooManyIds

T = TypeVar("T")

MAX_IDS = 65_536
"""Ids that a server takes in one request, unless it is set otherwise."""


class Planner:
    """Turns calls into plans; safe to share between threads.

    Args:
        on_missing: what an unknown id gets, unless a call says otherwise.
        max_ids: what has more ids travels as several requests.
        near_cache: answers what it can of lookups of integer ids.
        clock: seconds; tells how old the near-cache's news of a label are.
    """

    def __init__(
        self,
        *,
        on_missing: str = ON_MISSING_DEFAULT,
        max_ids: int = MAX_IDS,
        near_cache: NearCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_on_missing(on_missing)
        if isinstance(max_ids, bool) or not isinstance(max_ids, int):
            raise TypeError(f"max_ids must be a whole number of ids, got {max_ids!r:.40}")
        if max_ids < 1:
            raise ValueError(f"max_ids must be 1 or more, got {max_ids}")
        self.on_missing, self.max_ids, self.near_cache, self.clock = on_missing, max_ids, near_cache, clock
        self._learned: dict[str | None, int] = {}

    def lookup(
        self,
        table: str,
        ids: Ids,
        *,
        version: int | None = None,
        label: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
        offsets: Any = None,
        pooling: str | None = None,
        weights: Any = None,
    ) -> Plan[Rows]:
        """The plan of one table's lookup.

        Raises:
            TypeError, ValueError: what no server could answer.
            TooManyIds: one bag has more ids than a request may ask for.
        """
        on_missing = self.on_missing if on_missing is None else on_missing
        query = query_of(bags_of_call(ids, offsets, pooling, weights))
        cache = self.near_cache if query.offsets is None and not isinstance(query.ids, list) else None
        call = TableLookup(table, query, version, label, on_missing, dtype, self.max_ids, self.clock(), cache)
        return self._lookup(call, self.max_ids)

    def _lookup(self, call: TableLookup, limit: int) -> Plan[Rows]:
        smaller = partial(self._smaller, partial(self._lookup, call))
        if self._learned:
            limit = min(limit, self._learned.get(call.table, limit))
        if call.cache is None and call.query.size <= limit:
            return Plan((call.request(call.query),), the_only_answer, smaller)
        call = call.checked(limit, self.clock())
        plan = call.plan_whole() if call.cache is None or not call.query.size else call.plan_cached(call.cache)
        return Plan(plan.requests, plan.merge, smaller, plan.hits, plan.misses)

    def lookup_many(
        self,
        tables: Mapping[str, Ids | Bags],
        *,
        release: str | None = None,
        on_missing: str | None = None,
        dtype: str = DTYPE_DEFAULT,
    ) -> Plan[ManyRows]:
        """The plan of a lookup of several tables.

        Raises:
            TypeError, ValueError: what no server could answer.
            TooManyIds: one bag has more ids than a request may ask for.
        """
        on_missing = self.on_missing if on_missing is None else on_missing
        check_on_missing(on_missing)
        check_dtype(dtype)
        if release is not None:
            segment("release", release)
        queries = {table: query_of(given) for table, given in tables.items()}
        return self._lookup_many(ReleaseLookup(queries, release, on_missing, dtype), self.max_ids)

    def _lookup_many(self, call: ReleaseLookup, limit: int) -> Plan[ManyRows]:
        limit = min([limit, *(self._learned[key] for key in (None, *call.queries) if key in self._learned)])
        plan = call.plan_whole(limit)
        return Plan(plan.requests, plan.merge, partial(self._smaller, partial(self._lookup_many, call)))

    def _smaller(self, plan: Callable[[int], Plan[T]], error: TooLarge) -> Plan[T]:
        """The call again in smaller chunks, after the server refused one of its requests; `error` where none helps.

        A limit in ids is remembered for its table. One in bytes says nothing of other calls: half as many ids as were
        refused are tried, in this call alone.
        """
        num_ids = error.asked
        if num_ids is None or num_ids < 2:
            raise error
        if error.code == "too_many_ids" and error.limit is not None and 0 < error.limit < num_ids:
            # Of two threads that learn at once the one with the larger limit may win, and then learns once more.
            self._learned[error.table] = min(error.limit, self._learned.get(error.table, error.limit))
            return plan(error.limit)
        try:
            return plan(num_ids // 2)
        except TooManyIds:  # a bag cannot be cut
            raise error from None
