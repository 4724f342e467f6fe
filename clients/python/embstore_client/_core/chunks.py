"""Cutting what is asked into requests that a server takes, and joining the rows of several answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embstore_client._core.decode import widened, wire_rows
from embstore_client._core.query import Asked
from embstore_client._core.rows import Rows
from embstore_client._errors import ProtocolError, TooManyIds

Places: TypeAlias = slice | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Part of what a call asks of one table, and where its rows, and what was found of its ids, go in the whole."""

    asked: Asked
    rows_at: Places
    ids_at: Places


class Part(NamedTuple):
    """A piece that was answered: its rows as they travelled; `found` None where every id was."""

    piece: Piece
    wire: NDArray[Any]
    found: NDArray[np.bool_] | None
    version: int
    release: str | None
    request_id: str | None

    @staticmethod
    def of(piece: Piece, rows: Rows) -> Part:
        """What a reply says of a piece."""
        found = rows.found if rows.missing else None
        return Part(piece, wire_rows(rows), found, rows.version, rows.release, rows.request_id)


def cut(asked: Asked, limit: int, table: str, places: NDArray[np.int64] | None = None) -> list[Piece]:
    """Pieces of at most `limit` ids and rows each, in order; `places` where rows of ids do not lie in a row.

    Raises:
        TooManyIds: one bag alone has more ids than that.
    """
    if places is None and asked.size <= limit:
        return [Piece(asked, slice(0, asked.num_rows), slice(0, len(asked.ids)))]
    if asked.offsets is None:  # pieces of one size arrive together
        limit = max(1, -(-asked.size // -(-asked.size // limit)))
    pieces, first = [], 0
    while first < asked.num_rows:
        last = asked.last_within(first, limit)
        if last == first:
            raise _too_large(asked, first, limit, table)
        pieces.append(_piece(asked, first, last, places))
        first = last
    return pieces


def pack(tables: Mapping[str, Asked], limit: int) -> list[dict[str, Piece]]:
    """What several tables are asked for as requests of at most `limit` ids and rows each, in order.

    Raises:
        TooManyIds: one bag alone has more ids than that.
    """
    packs: list[dict[str, Piece]] = [{}]
    room = limit
    for table, asked in tables.items():
        first = 0
        while True:
            last = asked.last_within(first, room)
            if last > first or not asked.num_rows:
                packs[-1][table] = piece = _piece(asked, first, last)
                room -= piece.asked.size
            if last == asked.num_rows:
                break
            if last == first and room == limit:
                raise _too_large(asked, first, limit, table)
            if packs[-1]:
                packs.append({})
            first, room = last, limit
    return packs


def join(parts: Sequence[Part], num_rows: int, num_ids: int, dtype: str) -> Rows:
    """The rows of all parts, which are of one version and cover the whole, each at its place."""
    first = parts[0]
    if len({part.version for part in parts}) > 1:
        raise ProtocolError(f"one release answered with versions {sorted({part.version for part in parts})} of a table")
    if len({part.wire.shape[1] for part in parts}) > 1:
        raise ProtocolError(f"version {first.version} answered with vectors of different lengths")
    wire = np.empty((num_rows, first.wire.shape[1]), first.wire.dtype)
    found = np.ones(num_ids, np.bool_)
    for part in parts:
        wire[part.piece.rows_at] = part.wire
        if part.found is not None:
            found[part.piece.ids_at] = part.found
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


def _piece(asked: Asked, first: int, last: int, places: NDArray[np.int64] | None = None) -> Piece:
    part = asked.rows(first, last)
    if places is not None:
        return Piece(part, places[first:last], places[first:last])
    return Piece(part, slice(first, last), slice(asked.first_id(first), asked.first_id(last)))


def _too_large(asked: Asked, bag: int, limit: int, table: str) -> TooManyIds:
    num_ids = asked.first_id(bag + 1) - asked.first_id(bag)
    return TooManyIds(
        f"table {table!r}: bag {bag} has {num_ids:,} ids, and one request takes {limit:,}: a bag is pooled whole; "
        "make it smaller, or raise the limit of server and client (max_ids)",
        code="too_many_ids",
        table=table,
        limit=limit,
    )
