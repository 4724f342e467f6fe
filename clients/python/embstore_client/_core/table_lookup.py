"""A lookup of one table that takes several requests, or that the near-cache may answer in part or whole. No IO.

The answers of one call are from one version. Where chunks were answered by different ones (a new version came in
between, or the near-cache knew an older one), what is not from the newest is asked again, pinned to that version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.chunks import AnsweredChunk, Chunk, cut, join
from embstore_client._core.decode import widened
from embstore_client._core.near_cache import Hits, NearCache
from embstore_client._core.options import check_dtype, check_on_missing, check_version, lookup_path
from embstore_client._core.plan import Plan
from embstore_client._core.protocol import Request, build_lookup
from embstore_client._core.query import Query
from embstore_client._core.rows import Rows


@dataclass(frozen=True, slots=True, eq=False)
class TableLookup:
    """One lookup. `began` is when, which is how old the news in its answers are at most."""

    table: str
    query: Query
    version: int | None
    label: str | None
    on_missing: str
    dtype: str
    limit: int
    began: float
    cache: NearCache | None

    def checked(self, limit: int, began: float) -> TableLookup:
        """The same for requests of at most `limit` ids, in memory of its own; ValueError where it names no path."""
        check_on_missing(self.on_missing)
        check_dtype(self.dtype)
        version = None if self.version is None else check_version(self.version)
        lookup_path(self.table, version, self.label)
        return replace(self, query=self.query.copy(), version=version, limit=limit, began=began)

    def request(self, query: Query, pinned: int | None = None) -> Request[Rows]:
        version, label = (self.version, self.label) if pinned is None else (pinned, None)
        return build_lookup(
            self.table, query, version=version, label=label, on_missing=self.on_missing, dtype=self.dtype
        )

    def chunks(self, query: Query, places: NDArray[np.int64] | None = None) -> list[Chunk]:
        return cut(query, self.limit, self.table, places)

    def plan(self, asking: list[Chunk], known: list[AnsweredChunk], pinned: int | None = None) -> Plan[Rows]:
        requests = tuple(self.request(chunk.query, pinned) for chunk in asking)
        return Plan(requests, partial(self.merge, asking, known))

    def merge(self, asking: list[Chunk], known: list[AnsweredChunk], answers: Sequence[Rows]) -> Rows | Plan[Rows]:
        newest = max(rows.version for rows in answers)
        self.remember(asking, answers, newest)
        if len(answers) == 1 and not known:
            return answers[0]
        parts = known + [AnsweredChunk.of(chunk, rows) for chunk, rows in zip(asking, answers, strict=True)]
        stale = [part.chunk for part in parts if part.version != newest]
        if not stale and known and len({part.wire.shape[1] for part in parts}) > 1:
            # The near-cache knows a version of the same number from a store that was since made anew.
            return self.plan(self.chunks(self.query), [], pinned=newest)
        if not stale:
            return join(parts, self.query.num_rows, len(self.query.ids), self.dtype)
        # What was in the cache may be more than one request may ask.
        again = [part for chunk in stale for part in self.recut(chunk)]
        return self.plan(again, [part for part in parts if part.version == newest], pinned=newest)

    def recut(self, chunk: Chunk) -> list[Chunk]:
        return [chunk] if isinstance(chunk.ids_at, slice) else self.chunks(chunk.query, chunk.ids_at)

    def remember(self, asking: list[Chunk], answers: Sequence[Rows], newest: int) -> None:
        if self.cache is None or (
            self.version is None and not self.cache.saw(self.table, self.label, newest, self.began)
        ):
            return
        for chunk, rows in zip(asking, answers, strict=True):
            if rows.version == newest and not isinstance(chunk.query.ids, list):
                self.cache.put(self.table, chunk.query.ids, rows)

    def plan_whole(self) -> Plan[Rows]:
        """Asks the server for everything."""
        return self.plan(self.chunks(self.query), [])

    def plan_cached(self, cache: NearCache) -> Plan[Rows]:
        """Asks the server for what the near-cache does not know, and for an id more where its version is in doubt."""
        ids: Any = self.query.ids
        version, believed = self.version, True
        if version is None:
            version, believed = cache.version_of(self.table, self.label, self.began)
        if version is None:
            return self.plan_whole()
        hits = cache.get(self.table, version, self.dtype, ids)
        num_hits = 0 if hits is None else len(hits.places)
        plan = self.plan_whole() if hits is None else self.plan_knowing(hits, version, believed)
        return Plan(plan.requests, plan.merge, hits=num_hits, misses=len(ids) - num_hits)

    def plan_knowing(self, hits: Hits, version: int, believed: bool) -> Plan[Rows]:
        """Asks the server for the rest; for one at least where it is not `believed` that the version is current."""
        ids: Any = self.query.ids
        if len(hits.places) == len(ids):
            if believed:
                return Plan((), partial(_hit_rows, hits, version, self.dtype))
            hits = hits._replace(places=hits.places[1:], wire=hits.wire[1:])
        if not len(hits.places):
            return self.plan_whole()
        missed = np.ones(len(ids), np.bool_)
        missed[hits.places] = False
        places = np.flatnonzero(missed)
        known = Chunk(Query(ids[hits.places]), hits.places, hits.places)
        return self.plan(
            self.chunks(Query(ids[places]), places),
            [AnsweredChunk(known, hits.wire, None, version, hits.release, None)],
        )


def _hit_rows(hits: Hits, version: int, dtype: str, _: Sequence[Rows]) -> Rows:
    """What the near-cache knows of every id."""
    wire: NDArray[Any] = hits.wire
    wire.flags.writeable = False
    vectors, encoded = widened(wire, dtype)
    found = np.ones(len(wire), np.bool_)
    found.flags.writeable = False
    return Rows(
        vectors=vectors, found=found, version=version, missing=0, dtype=dtype, release=hits.release, encoded=encoded
    )
