"""JSON lookups: of one table, and of many from one release."""

# Shapes: B ids of a table, D embedding_dim.

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

from embstore.errors import BadRequest, ConfigError, DataError, Unprocessable
from embstore.pooling import Bags
from server.api.codecs import octet_stream
from server.api.codecs.vectors import (
    JSON,
    LONG_NUMBERS,
    OCTET_STREAM,
    PLACEHOLDER,
    TEXT_DTYPES,
    check_dtype,
    check_on_missing,
    encode_json,
    json_vectors,
    release_head,
    vectors_head,
)
from server.api.query import Answer, Call, Encoded, Query
from server.http.limits import Limits
from server.http.messages import Request

T = TypeVar("T")
PROTOCOL = "json"


class LookupBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a JSON lookup of one table."""

    ids: list[int | str]
    on_missing: str = "zero"
    dtype: str = "float32"
    found: bool = False
    offsets: list[int] | None = None
    pooling: str | None = None
    weights: list[float] | None = None


class ManyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a JSON lookup of many tables."""

    tables: dict[str, LookupBody]


_one = msgspec.json.Decoder(LookupBody)
_many = msgspec.json.Decoder(ManyBody)


def decode_one(request: Request, limits: Limits) -> Call:  # noqa: ARG001
    """A lookup of one table; `Accept: application/octet-stream` asks for rows as bytes."""
    route = request.route
    _refuse_query_string(route.query)
    body = _decode(_one, request.body)
    query = _query(route.table, body)
    pin: dict[str, Any] = {"version": route.version, "label": route.label}
    if OCTET_STREAM.encode() in request.headers.get(b"accept", b""):
        return Call([query], octet_stream.encode, octet_stream.PROTOCOL, **pin)
    _check_text_dtype(query)

    def encode(answers: list[Answer], release: str | None) -> Encoded:
        texts: list[memoryview] = []
        value = _table(answers[0], body.found, texts)
        return Encoded(vectors_head(JSON, answers[0], release), encode_json(value, texts))

    return Call([query], encode, PROTOCOL, inline_numbers=LONG_NUMBERS, **pin)


def decode_many(request: Request, limits: Limits) -> Call:  # noqa: ARG001
    """A lookup of many tables, all from one release: the one named in the path, or the one they all serve."""
    _refuse_query_string(request.route.query)
    bodies = _decode(_many, request.body).tables
    if not bodies:
        raise BadRequest('"tables" is empty: name at least one table, {"tables": {"item": {"ids": [1, 2]}}}')
    queries = [_query(name, body) for name, body in bodies.items()]
    for query in queries:
        _check_text_dtype(query)

    def encode(answers: list[Answer], release: str | None) -> Encoded:
        texts: list[memoryview] = []
        tables = {answer.table.name: _table(answer, bodies[answer.table.name].found, texts) for answer in answers}
        head = b"content-type: application/json\r\n" + release_head(release)
        return Encoded(head, encode_json({"release": release, "tables": tables}, texts))

    return Call(queries, encode, PROTOCOL, inline_numbers=LONG_NUMBERS, release=request.route.release)


def _refuse_query_string(query: bytes) -> None:
    """BadRequest when options of a JSON call stand where nobody reads them."""
    if query:
        raise BadRequest("a JSON lookup takes on_missing and dtype in its body, not in the query string")


def _decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"body: {error}") from error


def _query(table: str, body: LookupBody) -> Query:
    """The query of a body, its options checked."""
    check_on_missing(body.on_missing)
    check_dtype(body.dtype)
    bags = None
    if not (body.offsets is None and body.pooling is None and body.weights is None):
        try:
            bags = Bags.of(len(body.ids), body.offsets, body.pooling, body.weights)
        except (ConfigError, DataError) as error:
            raise Unprocessable(str(error), table=table) from error
    return Query(table, body.ids, body.on_missing, body.dtype, bags)


def _check_text_dtype(query: Query) -> None:
    """Unprocessable when a type has no place in JSON."""
    if query.dtype not in TEXT_DTYPES:
        raise Unprocessable(f"dtype {query.dtype} is binary only: send `Accept: {OCTET_STREAM}`")


def _table(answer: Answer, wants_found: bool, texts: list[memoryview]) -> dict[str, Any]:
    """One table's part of a reply; the text of its vectors goes to `texts`."""
    query, table, fetched = answer
    texts.append(json_vectors(fetched.vectors_BD, query.dtype))
    out: dict[str, Any] = {
        "table": table.name,
        "version": table.version,
        "embedding_dim": table.embedding_dim,
        "dtype": query.dtype,
        "vectors": PLACEHOLDER,
    }
    if fetched.found_B is not None or wants_found:
        out["found"] = np.ones(len(query.ids), np.bool_) if fetched.found_B is None else fetched.found_B
    return out
