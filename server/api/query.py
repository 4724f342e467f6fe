"""What a request asks for, whatever protocol it came by: a `Call` of queries, one for each table."""

# Shapes: B ids in a query, G bags of them, D embedding_dim.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from embstore.errors import BadRequest, TooManyIds, WrongDtype
from embstore.ids import Ids
from embstore.pooling import Bags
from embstore.table import Fetched, Table
from server.http.limits import Limits
from server.http.messages import Buffer
from server.http.problems import clip
from server.tables.snapshot import Snapshot

_INT64 = range(-(1 << 63), 1 << 63)


@dataclass(slots=True)
class Query:
    """A lookup in one table, as the request says it."""

    table: str
    ids: NDArray[np.int64] | Sequence[int | str]
    """int64 [B] where the request is binary; else integers, decimal strings, or the strings of a vocabulary."""
    on_missing: str = "zero"
    dtype: str = "float32"
    bags: Bags | None = None
    place: str = "ids"
    """What the request calls the ids, for messages."""
    fault: BadRequest | None = None
    """Why binary ids are not int64. A table of strings has more to say of them, so it is raised by `ids_for`."""

    @property
    def num_rows(self) -> int:
        """Vectors in the answer."""
        return len(self.ids) if self.bags is None else self.bags.num_bags

    def ids_for(self, table: Table) -> Ids:
        """The ids as the table takes them: int64 [B] (decimal strings accepted), or strings; else WrongDtype."""
        ids = self.ids
        takes_strings = table.ids.id_type is str
        if isinstance(ids, np.ndarray):
            if takes_strings:
                raise self._wrong_ids(table, 0)
            if self.fault is not None:
                raise self.fault
            return ids
        kinds = set(map(type, ids))
        if takes_strings:
            if kinds - {str}:
                raise self._wrong_ids(table, next(i for i, one in enumerate(ids) if not isinstance(one, str)))
            return ids  # type: ignore[return-value]
        if str in kinds:
            ids = [self._integer(one, at, table) if isinstance(one, str) else one for at, one in enumerate(ids)]
        try:
            return np.array(ids, np.int64)
        except OverflowError:
            raise self._wrong_ids(table, next(i for i, one in enumerate(ids) if one not in _INT64)) from None

    def _integer(self, text: str, at: int, table: Table) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise self._wrong_ids(table, at)
        return int(text)

    def _wrong_ids(self, table: Table, at: int) -> WrongDtype:
        """What to raise for the first id that is not of the table's type."""
        kind, hint = "int64", ""
        if table.ids.id_type is str:
            kind, hint = "string", "; send JSON strings, or BYTES by the Open Inference Protocol"
        first = ""
        if len(self.ids):
            wrong = self.ids[at]
            shown = clip(wrong) if isinstance(wrong, str) else clip(str(wrong)).strip("'")
            first = f"; {self.place}[{at}] is {shown}"
        return WrongDtype(f"table {table.name!r} has {kind} ids{first}{hint}", table=table.name)


class Answer(NamedTuple):
    """A query with what was found for it."""

    query: Query
    table: Table
    fetched: Fetched


class Encoded(NamedTuple):
    """A reply, but for its status: header lines and body."""

    head: bytes
    body: tuple[Buffer, ...]
    sends_rows: bool = False
    """Whether the body reads the memory of the vectors themselves."""


Encoder = Callable[[list[Answer], str | None], Encoded]
"""Writes the reply of a call from the answers to its queries, in their order, and the release they are all of."""


@dataclass(slots=True)
class Call:
    """Everything a lookup request says: at least one query, which versions, and how the reply is written."""

    queries: list[Query]
    encode: Encoder
    protocol: str
    """How the reply is written, one of `server.metrics.recorder.PROTOCOLS`."""
    inline_numbers: int | None = None
    """Vectors of more numbers than this are encoded in a thread; None: encoding them takes no time."""
    version: int | None = None
    label: str | None = None
    release: str | None = None


def resolve(call: Call, snapshot: Snapshot) -> tuple[str | None, dict[str, Table]]:
    """The tables of a call, all from one release where there is one, and that release."""
    names = [query.table for query in call.queries]
    if call.version is None and call.label is None:
        return snapshot.together(names, call.release)
    table = snapshot.table(names[0], version=call.version, label=call.label)
    return snapshot.release_of.get((table.name, table.version)), {table.name: table}


def check_limits(queries: list[Query], tables: dict[str, Table], limits: Limits) -> None:
    """TooManyIds when the queries together ask for more than a request may, or than a reply has room for."""
    num_ids = num_rows = num_bytes = 0
    for query in queries:
        rows = query.num_rows
        num_ids += len(query.ids)
        num_rows += rows
        num_bytes += 4 * rows * tables[query.table].embedding_dim
    for number, what in ((num_ids, "ids"), (num_rows, "vectors")):
        if number > (most := limits.max_ids):
            raise TooManyIds(f"{number:,} {what} in one request; the limit is {most:,} (max_ids)", limit=most)
    if num_bytes > limits.max_reply_bytes:
        most = limits.max_reply_bytes
        if len(queries) == 1:  # the limit in the caller's own terms: fewer ids is what helps
            most //= 4 * tables[queries[0].table].embedding_dim
            what = "ids" if queries[0].bags is None else "bags"
            raise TooManyIds(
                f"{num_rows:,} {what} in one request; the limit is {most:,} for vectors of this size (max_reply_bytes)",
                limit=most,
            )
        raise TooManyIds(
            f"the vectors of this request take {num_bytes:,} bytes; the limit is {most:,} (max_reply_bytes)", limit=most
        )
