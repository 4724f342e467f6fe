"""The HTTP contract without any IO: build a `Request`, send it, give the `Reply` to `request.parse`.

Both clients send what this file builds, so they cannot disagree about a byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from embstore_client._core.decode import rows_from_json, rows_from_octets
from embstore_client._core.options import (
    DTYPE_DEFAULT,
    ON_MISSING_DEFAULT,
    check_dtype,
    check_on_missing,
    check_version,
    lookup_path,
    lookup_query,
    segment,
)
from embstore_client._core.problem import parse_problem
from embstore_client._core.query import Given, Query, query_of
from embstore_client._core.rows import ManyRows, Rows
from embstore_client._errors import ProtocolError, TooLarge

T_co = TypeVar("T_co", covariant=True)

OCTETS = "application/octet-stream"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Reply:
    """One HTTP answer, whole: the names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Request(Generic[T_co]):
    """One HTTP call to make, and how to read its answer: `target` is path and query, already quoted."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    parse: Callable[[Reply], T_co]


def fold_headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Header lines as one mapping with lower-case names; a repeated name keeps every value, with commas."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


_BINARY_HEADERS = (("content-type", OCTETS), ("accept", OCTETS))
_KEYS_HEADERS = (("content-type", JSON), ("accept", OCTETS))
_JSON_HEADERS = (("content-type", JSON), ("accept", JSON))
_GET_HEADERS = (("accept", JSON),)


def build_lookup(
    table: str,
    ids: Given,
    *,
    version: int | None = None,
    label: str | None = None,
    on_missing: str = ON_MISSING_DEFAULT,
    dtype: str = DTYPE_DEFAULT,
) -> Request[Rows]:
    """The call that looks `ids` up: integers travel as octets, keys and bags as JSON; rows return as octets."""
    check_on_missing(on_missing)
    check_dtype(dtype)
    if version is not None:
        version = check_version(version)
    path = lookup_path(table, version, label)
    query = query_of(ids)
    num_ids, num_rows = len(query.ids), query.num_rows
    parse = partial(parse_lookup, table=table, num_ids=num_ids, num_rows=num_rows, dtype=dtype, version=version)
    if query.offsets is None and not isinstance(query.ids, list):
        target = path + lookup_query(on_missing, dtype)
        return Request("POST", target, _BINARY_HEADERS, query.ids.tobytes(), parse)
    return Request("POST", path, _KEYS_HEADERS, _dump(_fields(query, on_missing, dtype)), parse)


def parse_lookup(
    reply: Reply, *, table: str, num_ids: int, num_rows: int, dtype: str, version: int | None = None
) -> Rows:
    """The rows in a lookup's answer, without copying them; an answer that is not exactly right is refused.

    Raises:
        ServiceError: the server answered with an error; the subclass says which.
        ProtocolError: the answer is truncated, mislabelled, or to another question.
    """
    kind = check_ok(reply, table, max(num_ids, num_rows))
    if kind == OCTETS:
        return rows_from_octets(
            reply.headers, reply.body, num_ids=num_ids, num_rows=num_rows, dtype=dtype, version=version
        )
    if kind != JSON:
        raise ProtocolError(f"rows must come as {OCTETS} or {JSON}, got {kind or 'no content type'!r}")
    return rows_from_json(
        load_json(reply.body),
        table=table,
        num_ids=num_ids,
        num_rows=num_rows,
        dtype=dtype,
        version=version,
        release=reply.headers.get("x-embedding-release"),
        request_id=reply.headers.get("x-request-id"),
    )


def build_lookup_many(
    ids_by_table: Mapping[str, Given],
    *,
    release: str | None = None,
    on_missing: str = ON_MISSING_DEFAULT,
    dtype: str = DTYPE_DEFAULT,
) -> Request[ManyRows]:
    """The call that looks ids up in several tables of one release, JSON both ways: where binary does not suit."""
    check_on_missing(on_missing)
    check_dtype(dtype)
    if dtype == "int8":
        raise ValueError("many tables in one call take dtype float32, float16 or bfloat16; int8 is for one table")
    if not ids_by_table:
        raise ValueError('name at least one table: {"item": [3, 14]}')
    path = "/v1/lookup" if release is None else f"/v1/releases/{segment('release', release)}/lookup"
    for table in ids_by_table:
        segment("table", table)
    queries = {table: query_of(ids) for table, ids in ids_by_table.items()}
    tables = {table: _fields(one, on_missing, dtype) for table, one in queries.items()}
    parse = partial(parse_lookup_many, sizes=sizes_of(queries), dtype=dtype, release=release)
    return Request("POST", path, _JSON_HEADERS, _dump({"tables": tables}), parse)


def sizes_of(queries: Mapping[str, Query]) -> dict[str, tuple[int, int]]:
    """How many ids each table is asked for, and how many rows come back."""
    return {table: (len(one.ids), one.num_rows) for table, one in queries.items()}


def parse_lookup_many(
    reply: Reply, *, sizes: Mapping[str, tuple[int, int]], dtype: str, release: str | None = None
) -> ManyRows:
    """The rows of every table that was asked for; one wrong or absent table refuses the whole answer.

    Raises:
        ServiceError: the server answered with an error; the subclass says which.
        ProtocolError: the answer is mislabelled, to another question, or from two releases.
    """
    document = _json_document(reply, sum(map(max, sizes.values())))
    if not isinstance(document, dict):
        raise ProtocolError(f"the answer must be an object, got {document!r:.80}")
    answered = document.get("release")
    if answered is not None and not isinstance(answered, str):
        raise ProtocolError(f"`release` must be a string, got {answered!r:.80}")
    check_release(reply, answered, release)
    entries = document.get("tables")
    if not isinstance(entries, dict) or entries.keys() != sizes.keys():
        got = sorted(entries) if isinstance(entries, dict) else entries
        raise ProtocolError(f"asked for tables {sorted(sizes)}, got {got!r:.200}")
    request_id = reply.headers.get("x-request-id")
    rows = {
        table: rows_from_json(
            entries[table],
            table=table,
            num_ids=num_ids,
            num_rows=num_rows,
            dtype=dtype,
            version=None,
            release=answered,
            request_id=request_id,
        )
        for table, (num_ids, num_rows) in sizes.items()
    }
    return ManyRows(rows, release=answered, request_id=request_id)


def check_release(reply: Reply, answered: str | None, release: str | None) -> None:
    """ProtocolError unless a many-table answer is from one release, and from the one that was asked for."""
    if release is not None and answered != release:
        raise ProtocolError(f"asked for release {release!r}, got {answered!r:.80}")
    header = reply.headers.get("x-embedding-release", answered)
    if header != answered:
        raise ProtocolError(f"the answer names two releases, {answered!r:.80} and {header!r:.80}")


def build_tables() -> Request[list[dict[str, Any]]]:
    """The call that lists what is served."""
    return Request("GET", "/v1/tables", _GET_HEADERS, b"", parse_tables)


def parse_tables(reply: Reply) -> list[dict[str, Any]]:
    """One dict a table: a list, bare or under `tables`.

    Raises:
        ServiceError: the server answered with an error; the subclass says which.
        ProtocolError: the answer is something else.
    """
    document = _json_document(reply)
    tables = document.get("tables") if isinstance(document, dict) else document
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ProtocolError(f"tables must be a list of objects, got {document!r:.80}")
    return tables


def build_ready() -> Request[bool]:
    """The call that asks whether lookups are being answered."""
    return Request("GET", "/readyz", _GET_HEADERS, b"", parse_ready)


def parse_ready(reply: Reply) -> bool:
    """True for 200, False for 503; any other status means that this is no embstore, and raises."""
    if reply.status == 503:
        return False
    check_ok(reply)
    return True


def check_ok(reply: Reply, table: str | None = None, size: int | None = None) -> str:
    """The content type of a 200, without its parameters; anything but a 200 raises.

    An error learns which `table` and how many ids were asked for, where the server does not say.
    """
    if reply.status >= 400:
        error = parse_problem(reply.status, reply.headers, reply.body)
        error.table = table if error.table is None else error.table
        if isinstance(error, TooLarge):
            error.asked = size
        raise error
    if reply.status != 200:
        where = f", pointing at {reply.headers['location']:.200}" if "location" in reply.headers else ""
        raise ProtocolError(f"expected status 200, got {reply.status}{where}")
    return reply.headers.get("content-type", "").partition(";")[0].strip().lower()


def _fields(query: Query, on_missing: str, dtype: str) -> dict[str, Any]:
    """One table's part of a JSON body."""
    ids = query.ids if isinstance(query.ids, list) else query.ids.tolist()
    fields = {"ids": ids, "on_missing": on_missing, "dtype": dtype}
    if query.offsets is not None:
        fields |= {"offsets": query.offsets.tolist(), "pooling": query.pooling}
        if query.weights is not None:
            fields["weights"] = query.weights.tolist()
    return fields


def _dump(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def load_json(text: bytes) -> Any:
    """What JSON says; ProtocolError when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the answer says it is JSON and is not") from error


def _json_document(reply: Reply, size: int | None = None) -> Any:
    if check_ok(reply, size=size) != JSON:
        raise ProtocolError(f"the answer must be {JSON}, got {reply.headers.get('content-type')!r:.80}")
    return load_json(reply.body)
