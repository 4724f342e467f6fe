"""What travels for a call. No IO: the shells carry it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from ._bags import Bags, asked_of, bags_of_call
from ._errors import ServiceError, TooLarge
from ._ids import Ids
from ._many_tables import ManyCall
from ._near_cache import NearCache
from ._one_table import TableCall
from ._options import (
    DTYPE_DEFAULT,
    ON_MISSING_DEFAULT,
    check_dtype,
    check_on_missing,
    check_version,
    lookup_path,
    segment,
)
from ._plan import Plan
from ._protocol import build_lookup
from ._rows import ManyRows, Rows

MAX_IDS = 65_536
"""Ids that a server takes in one request, unless it is set otherwise."""
_the_only_answer = itemgetter(0)


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
        if near_cache is not None:
            near_cache.claim()
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
        asked = asked_of(bags_of_call(ids, offsets, pooling, weights))
        limit = min(self.max_ids, self._learned.get(table, self.max_ids)) if self._learned else self.max_ids
        cache = self.near_cache if asked.offsets is None and not isinstance(asked.ids, list) else None
        if cache is None and asked.size <= limit:
            request = build_lookup(table, asked, version=version, label=label, on_missing=on_missing, dtype=dtype)
            return Plan((request,), _the_only_answer)
        check_on_missing(on_missing)
        check_dtype(dtype)
        version = None if version is None else check_version(version)
        lookup_path(table, version, label)
        call = TableCall(table, asked.copy(), version, label, on_missing, dtype, limit, self.clock(), cache)
        return call.plan_whole() if cache is None or not asked.size else call.plan_cached(cache)

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
        asked = {table: asked_of(given) for table, given in tables.items()}
        limit = min([self.max_ids, *(self._learned[key] for key in (None, *asked) if key in self._learned)])
        return ManyCall(asked, release, on_missing, dtype).plan_whole(limit)

    def learn_limit(self, error: ServiceError) -> bool:
        """Whether the call should be planned again, in smaller pieces, after the server refused one as too large.

        A limit in ids is taken as it is. A limit in bytes says nothing of ids: half as many are tried next.
        """
        if not isinstance(error, TooLarge) or error.asked is None:
            return False
        limit = error.limit if error.code == "too_many_ids" else None
        smaller = limit if limit is not None and 0 < limit < error.asked else error.asked // 2
        if smaller < 1:
            return False
        # Of two threads that learn at once the one with the larger limit may win, and then learns once more.
        self._learned[error.table] = min(smaller, self._learned.get(error.table, smaller))
        return True
