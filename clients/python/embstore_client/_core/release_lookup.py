"""A lookup of several tables: the request it takes, and the joining of several where one may not ask so much. No IO.

All answers of one call are from one release. Where chunks were answered by different ones (a release came in between),
what is not from the newest is asked again, pinned to that release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from embstore_client._core.chunks import AnsweredChunk, Chunk, join, pack
from embstore_client._core.open_inference import build_infer_many, suits
from embstore_client._core.plan import Plan, the_only_answer
from embstore_client._core.protocol import Request, build_lookup_many
from embstore_client._core.query import Query
from embstore_client._core.rows import ManyRows, Rows
from embstore_client._errors import ProtocolError

_Pack: TypeAlias = dict[str, Chunk]
_Answered: TypeAlias = tuple[_Pack, ManyRows]


@dataclass(frozen=True, slots=True, eq=False)
class ReleaseLookup:
    """One lookup of several tables, checked."""

    queries: Mapping[str, Query]
    release: str | None
    on_missing: str
    dtype: str

    def plan_whole(self, limit: int) -> Plan[ManyRows]:
        """One request, or several of at most `limit` ids each."""
        if sum(one.size for one in self.queries.values()) <= limit:
            return Plan((self._request(self.queries, self.release),), the_only_answer)
        frozen = {table: one.copy() for table, one in self.queries.items()}
        return self._plan(pack(frozen, limit), [], self.release, last=False)

    def _request(self, queries: Mapping[str, Query], release: str | None) -> Request[ManyRows]:
        """Binary where that suits, else JSON."""
        build = build_infer_many if suits(queries, release, self.dtype) else build_lookup_many
        return build(queries, release=release, on_missing=self.on_missing, dtype=self.dtype)

    def _plan(self, asking: list[_Pack], known: list[_Answered], release: str | None, *, last: bool) -> Plan[ManyRows]:
        requests = [self._request({table: chunk.query for table, chunk in one.items()}, release) for one in asking]
        return Plan(requests, partial(self._merge, asking, known, last))

    def _merge(
        self, asking: list[_Pack], known: list[_Answered], last: bool, answers: Sequence[ManyRows]
    ) -> ManyRows | Plan[ManyRows]:
        answered = known + list(zip(asking, answers, strict=True))
        releases = {rows.release for _, rows in answered}
        if len(releases) == 1 and (None not in releases or _agree(answered)):
            return self._join(answered, releases.pop())
        if last:
            raise ProtocolError("the pieces of this call were answered by different versions twice; ask again")
        newest = max((name for name in releases if name is not None), key=_age, default=None)
        if newest is None:  # tables that were not published together have no release to pin
            return self._plan(asking, [], None, last=True)
        fresh = [one for one in answered if one[1].release == newest]
        stale = [one for one, rows in answered if rows.release != newest]
        return self._plan(stale, fresh, newest, last=True)

    def _join(self, answered: list[_Answered], release: str | None) -> ManyRows:
        whole = {}
        for table, query in self.queries.items():
            chunks: list[tuple[Chunk, Rows]] = [(one[table], rows[table]) for one, rows in answered if table in one]
            if len(chunks) == 1:
                whole[table] = chunks[0][1]
            else:
                parts = [AnsweredChunk.of(chunk, rows) for chunk, rows in chunks]
                whole[table] = join(parts, query.num_rows, len(query.ids), self.dtype)
        request_ids = [rows.request_id for _, rows in answered if rows.request_id is not None]
        return ManyRows(whole, release=release, request_id=", ".join(request_ids) or None)


def _agree(answered: list[_Answered]) -> bool:
    """Whether each table was answered by one version."""
    versions: dict[str, int] = {}
    return all(
        versions.setdefault(table, one.version) == one.version for _, many in answered for table, one in many.items()
    )


def _age(release: str) -> tuple[int, str]:
    """Later releases are greater: their names are numbers that grow."""
    return (int(release) if release.isascii() and release.isdigit() else -1, release)
