"""A near-cache: rows of hot ids kept in the client, each under the version that it came from."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.decode import DTYPES, wire_rows
from embstore_client._core.hot_rows import HotRows
from embstore_client._core.rows import Rows

MAX_AGE_S = 1.0
_MAX_TABLES = 64
Key = tuple[str, int, str]
"""Table, version, dtype."""


class Hits(NamedTuple):
    """What the cache knows of a call: places of ids, their rows as they travelled, and the release they are from."""

    places: NDArray[np.int64]
    wire: NDArray[np.generic]
    release: str | None


@dataclass(slots=True)
class _Kept:
    rows: HotRows
    release: str | None


class NearCache:
    """Keeps rows of ids that are asked for often, so that they need not travel again; safe to share between threads.

    For integer ids of `lookup`; keys that are strings, bags and `lookup_many` always ask the server. Ids that a table
    does not know are not kept. Versions are never mixed: a reply from a new version ends the old one's rows.

    Args:
        max_bytes: of all rows and bookkeeping together. Tables have equal shares.
        max_age_s: how long after a label (or latest) was seen to name a version it is believed without asking. A new
            version is noticed that much later, at worst. 0: every call asks the server at least for one id.
            Pinned versions never change, and need no asking.

    Attributes:
        hits, misses: ids that were answered from here, and those that were not.
        evictions: ids that made room for hotter ones.

    A cache belongs to one client: two clients may speak to servers with different tables of the same name. A store
    that is made anew counts its versions from 1 again: `clear` then, for only rows of another length are noticed.

    >>> cache = NearCache(64 << 20, max_age_s=0.5)
    >>> cache.hits, cache.misses
    (0, 0)
    """

    def __init__(self, max_bytes: int, max_age_s: float = MAX_AGE_S) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes must be a whole number of bytes, got {max_bytes!r:.40}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be above 0, got {max_bytes}; near_cache=None is a client without one")
        if isinstance(max_age_s, bool) or not isinstance(max_age_s, int | float):
            raise TypeError(f"max_age_s must be seconds, got {max_age_s!r:.40}")
        if not 0 <= max_age_s < float("inf"):
            raise ValueError(f"max_age_s must be seconds, 0 or more, got {max_age_s}")
        self.max_bytes, self.max_age_s = max_bytes, float(max_age_s)
        self.hits = self.misses = 0
        self._evicted = 0  # by tables that are gone
        self._kept: dict[Key, _Kept] = {}  # least recently asked for first
        self._seen: dict[tuple[str, str | None], tuple[int, float]] = {}
        self._owned = False
        self._lock = threading.Lock()

    @property
    def evictions(self) -> int:
        """Ids that made room for hotter ones."""
        with self._lock:
            return self._evicted + sum(kept.rows.evictions for kept in self._kept.values())

    @property
    def num_bytes(self) -> int:
        """What rows and bookkeeping take now; memory that was never written counts too."""
        with self._lock:
            return self._num_bytes()

    def clear(self) -> None:
        """Forgets every row and every version; the counters stay."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)
            self._seen.clear()

    def __repr__(self) -> str:
        return f"NearCache({self.max_bytes}, max_age_s={self.max_age_s:g}): {self.hits} hits, {self.misses} misses"

    # What the planner asks and says

    def claim(self) -> None:
        """Makes this the cache of one client; ValueError when it is another one's already."""
        with self._lock:
            if self._owned:
                raise ValueError("this NearCache belongs to another client already: make one for each")
            self._owned = True

    def version_of(self, table: str, label: str | None, now: float) -> tuple[int | None, bool]:
        """The version that a label (None: latest) was last seen to name, and whether that is to be believed still."""
        with self._lock:
            version, at = self._seen.get((table, label), (None, 0.0))
        return version, version is not None and now - at < self.max_age_s

    def get(self, table: str, version: int, dtype: str, ids: NDArray[np.int64]) -> Hits | None:
        """The rows of those ids that are kept; None where nothing of this version is."""
        key = (table, version, dtype)
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is None:
                self.misses += len(ids)
                return None
            self._kept[key] = kept
            places, raw = kept.rows.get(ids)
            self.hits += len(places)
            self.misses += len(ids) - len(places)
            return Hits(places, raw.view(DTYPES[dtype]), kept.release)

    def saw(self, table: str, label: str | None, version: int, at: float) -> bool:
        """A label named this version at some time, or later; False when later news is known already."""
        with self._lock:
            before = self._seen.get((table, label))
            if before is not None and at < before[1]:
                return before[0] == version
            self._seen[table, label] = version, at
            if before is not None and before[0] != version:
                self._drop_unnamed(table, before[0])
            return True

    def put(self, table: str, ids: NDArray[np.int64], rows: Rows) -> None:
        """Offers the rows of a reply; those of ids that were not found are left out."""
        wire = wire_rows(rows)
        if rows.missing:
            ids, wire = ids[rows.found], wire[rows.found]
        if not len(ids):
            return
        raw = np.ascontiguousarray(wire).view(np.uint8)
        with self._lock:
            key = (table, rows.version, rows.dtype)
            kept = self._kept.get(key)
            if kept is not None and kept.rows.row_bytes != raw.shape[1]:
                self._drop_version(table, rows.version)
            kept = self._room(key, raw.shape[1])
            if kept is not None:
                kept.release = rows.release
                kept.rows.put(ids, raw)

    # Within the lock

    def _room(self, key: Key, row_bytes: int) -> _Kept | None:
        """The rows of a version, with a share of the bytes; None where such rows do not fit into a share."""
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        while len(self._kept) >= _MAX_TABLES:
            self._drop(next(iter(self._kept)))
        # Shares are halved when there are 2, 3, 5, 9, ... tables, not with each new one: who has more starts again.
        share = self.max_bytes >> len(self._kept).bit_length()
        if not HotRows.fits(share, row_bytes):
            return None
        for other in [other for other, rest in self._kept.items() if rest.rows.num_bytes > share]:
            self._drop(other)
        kept = self._kept[key] = _Kept(HotRows(share, row_bytes), None)
        return kept

    def _drop_unnamed(self, table: str, version: int) -> None:
        """Drops a version unless another label of the table names it."""
        if any(name == table and seen == version for (name, _), (seen, _) in self._seen.items()):
            return
        self._drop_version(table, version)

    def _drop_version(self, table: str, version: int) -> None:
        for key in [key for key in self._kept if key[0] == table and key[1] == version]:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._evicted += self._kept.pop(key).rows.evictions

    def _num_bytes(self) -> int:
        return sum(kept.rows.num_bytes for kept in self._kept.values())
