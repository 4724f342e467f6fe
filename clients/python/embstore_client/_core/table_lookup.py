"""A lookup of one table that takes several requests, or that the near-cache may answer in part or whole. No IO.

The answers of one call are from one version. Where pieces were answered by different ones (a new version came in
between, or the near-cache knew an older one), what is not from the newest is asked again, pinned to that version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.chunks import Part, Piece, cut, join
from embstore_client._core.decode import widened
from embstore_client._core.near_cache import Hits, NearCache
from embstore_client._core.plan import Plan
from embstore_client._core.protocol import Request, build_lookup
from embstore_client._core.query import Asked
from embstore_client._core.rows import Rows


@dataclass(frozen=True, slots=True, eq=False)
class TableCall:
    """One lookup, checked. `began` is when, which is how old the news in its answers are at most."""

    table: str
    asked: Asked
    version: int | None
    label: str | None
    on_missing: str
    dtype: str
    limit: int
    began: float
    cache: NearCache | None

    def request(self, piece: Piece, pinned: int | None) -> Request[Rows]:
        version, label = (self.version, self.label) if pinned is None else (pinned, None)
        return build_lookup(
            self.table, piece.asked, version=version, label=label, on_missing=self.on_missing, dtype=self.dtype
        )

    def pieces(self, asked: Asked, places: NDArray[np.int64] | None = None) -> list[Piece]:
        return cut(asked, self.limit, self.table, places)

    def plan(self, asking: list[Piece], known: list[Part], pinned: int | None = None) -> Plan[Rows]:
        requests = tuple(self.request(piece, pinned) for piece in asking)
        return Plan(requests, partial(self.merge, asking, known))

    def merge(self, asking: list[Piece], known: list[Part], answers: Sequence[Rows]) -> Rows | Plan[Rows]:
        newest = max(rows.version for rows in answers)
        self.remember(asking, answers, newest)
        if len(answers) == 1 and not known:
            return answers[0]
        parts = known + [Part.of(piece, rows) for piece, rows in zip(asking, answers, strict=True)]
        stale = [part.piece for part in parts if part.version != newest]
        if not stale and known and len({part.wire.shape[1] for part in parts}) > 1:
            # The near-cache knows a version of the same number from a store that was since made anew.
            return self.plan(self.pieces(self.asked), [], pinned=newest)
        if not stale:
            return join(parts, self.asked.num_rows, len(self.asked.ids), self.dtype)
        # What was in the cache may be more than one request may ask.
        again = [part for piece in stale for part in self.recut(piece)]
        return self.plan(again, [part for part in parts if part.version == newest], pinned=newest)

    def recut(self, piece: Piece) -> list[Piece]:
        return [piece] if isinstance(piece.ids_at, slice) else self.pieces(piece.asked, piece.ids_at)

    def remember(self, asking: list[Piece], answers: Sequence[Rows], newest: int) -> None:
        if self.cache is None or (
            self.version is None and not self.cache.saw(self.table, self.label, newest, self.began)
        ):
            return
        for piece, rows in zip(asking, answers, strict=True):
            if rows.version == newest and not isinstance(piece.asked.ids, list):
                self.cache.put(self.table, piece.asked.ids, rows)

    def plan_whole(self) -> Plan[Rows]:
        """Asks the server for everything."""
        return self.plan(self.pieces(self.asked), [])

    def plan_cached(self, cache: NearCache) -> Plan[Rows]:
        """Asks the server for what the near-cache does not know, and for an id more where its version is in doubt."""
        ids: Any = self.asked.ids
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
        ids: Any = self.asked.ids
        if len(hits.places) == len(ids):
            if believed:
                return Plan((), partial(_hit_rows, hits, version, self.dtype))
            hits = hits._replace(places=hits.places[1:], wire=hits.wire[1:])
        if not len(hits.places):
            return self.plan_whole()
        missed = np.ones(len(ids), np.bool_)
        missed[hits.places] = False
        places = np.flatnonzero(missed)
        known = Piece(Asked(ids[hits.places]), hits.places, hits.places)
        return self.plan(
            self.pieces(Asked(ids[places]), places), [Part(known, hits.wire, None, version, hits.release, None)]
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
