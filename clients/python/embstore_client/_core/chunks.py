"""Cutting what is asked into requests that a server takes, and joining the rows of several answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.decode import widened, wire_rows
from embstore_client._core.query import Query
from embstore_client._core.rows import Rows
from embstore_client._errors import ProtocolError, TooManyIds

Places: TypeAlias = slice | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Part of what a call asks of one table, and where its rows, and what was found of its ids, go in the whole."""

    query: Query
    rows_at: Places
    ids_at: Places


class AnsweredChunk(NamedTuple):
    """A chunk that was answered: its rows as they travelled; `found` None where every id was."""

    chunk: Chunk
    wire: NDArray[Any]
    found: NDArray[np.bool_] | None
    version: int
    release: str | None
    request_id: str | None

    @staticmethod
    def of(chunk: Chunk, rows: Rows) -> AnsweredChunk:
        """What a reply says of a chunk."""
        found = rows.found if rows.missing else None
        return AnsweredChunk(chunk, wire_rows(rows), found, rows.version, rows.release, rows.request_id)


def cut(query: Query, limit: int, table: str, places: NDArray[np.int64] | None = None) -> list[Chunk]:
    """Chunks of at most `limit` ids and rows each, in order; `places` where rows of ids do not lie in a row.

    Raises:
        TooManyIds: one bag alone has more ids than that.
    """
    if places is None and query.size <= limit:
        return [Chunk(query, slice(0, query.num_rows), slice(0, len(query.ids)))]
    if query.offsets is None:  # chunks of one size arrive together
        limit = max(1, -(-query.size // -(-query.size // limit)))
    chunks, first = [], 0
    while first < query.num_rows:
        last = query.last_within(first, limit)
        if last == first:
            raise _too_large(query, first, limit, table)
        chunks.append(_chunk(query, first, last, places))
        first = last
    return chunks


def pack(tables: Mapping[str, Query], limit: int) -> list[dict[str, Chunk]]:
    """What several tables are asked for as requests of at most `limit` ids and rows each, in order.

    Raises:
        TooManyIds: one bag alone has more ids than that.
    """
    packs: list[dict[str, Chunk]] = [{}]
    room = limit
    for table, query in tables.items():
        first = 0
        while True:
            last = query.last_within(first, room)
            if last > first or not query.num_rows:
                packs[-1][table] = chunk = _chunk(query, first, last)
                room -= chunk.query.size
            if last == query.num_rows:
                break
            if last == first and room == limit:
                raise _too_large(query, first, limit, table)
            if packs[-1]:
                packs.append({})
            first, room = last, limit
    return packs


def join(parts: Sequence[AnsweredChunk], num_rows: int, num_ids: int, dtype: str) -> Rows:
    """The rows of all chunks, which are of one version and cover the whole, each at its place."""
    first = parts[0]
    if len({part.version for part in parts}) > 1:
        raise ProtocolError(f"one release answered with versions {sorted({part.version for part in parts})} of a table")
    if len({part.wire.shape[1] for part in parts}) > 1:
        raise ProtocolError(f"version {first.version} answered with vectors of different lengths")
    wire = np.empty((num_rows, first.wire.shape[1]), first.wire.dtype)
    found = np.ones(num_ids, np.bool_)
    for part in parts:
        wire[part.chunk.rows_at] = part.wire
        if part.found is not None:
            found[part.chunk.ids_at] = part.found
    wire.flags.writeable = found.flags.writeable = False
    vectors, encoded = widened(wire, dtype)
    request_ids = [part.request_id for part in parts if part.request_id is not None]
    return Rows(
        vectors=vectors,
        found=found,
        version=first.version,
        missing=num_ids - int(np.count_nonzero(found)),
        dtype=dtype,
        release=next((part.release for part in parts if part.release is not None), None),
        request_id=", ".join(request_ids) or None,
        encoded=encoded,
    )


def _chunk(query: Query, first: int, last: int, places: NDArray[np.int64] | None = None) -> Chunk:
    part = query.rows(first, last)
    if places is not None:
        return Chunk(part, places[first:last], places[first:last])
    return Chunk(part, slice(first, last), slice(query.first_id(first), query.first_id(last)))


def _too_large(query: Query, bag: int, limit: int, table: str) -> TooManyIds:
    num_ids = query.first_id(bag + 1) - query.first_id(bag)
    return TooManyIds(
        f"table {table!r}: bag {bag} has {num_ids:,} ids, and one request takes {limit:,}: a bag is pooled whole; "
        "make it smaller, or raise the limit of server and client (max_ids)",
        code="too_many_ids",
        table=table,
        limit=limit,
    )
