"""The octet stream: little-endian int64 ids in, row-major rows out, and a bit for each id where one is missing."""

# Shapes: B ids in a request, D embedding_dim.

from __future__ import annotations

from functools import lru_cache
from urllib.parse import parse_qsl

import numpy as np

from embstore.errors import BadRequest
from server.api.codecs.vectors import (
    OCTET_STREAM,
    check_dtype,
    check_on_missing,
    encode_found,
    encode_rows,
    vectors_head,
)
from server.api.query import Answer, Call, Encoded, Query
from server.http.limits import Limits
from server.http.messages import Request
from server.http.problems import clip

PROTOCOL = "octet-stream"


def decode(request: Request, limits: Limits) -> Call:  # noqa: ARG001
    """A lookup of one table: the body is its ids, options are in the query string."""
    route, body = request.route, request.body
    on_missing, dtype = decode_options(route.query)
    query = Query(route.table, np.frombuffer(body, np.int64, len(body) // 8), on_missing, dtype)
    if len(body) % 8:
        query.fault = BadRequest(f"the body has {len(body):,} bytes; int64 ids take a multiple of 8")
    return Call([query], encode, PROTOCOL, version=route.version, label=route.label)


@lru_cache(1024)
def decode_options(query: bytes) -> tuple[str, str]:
    """on_missing and dtype of a query string."""
    if not query:
        return "zero", "float32"
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise BadRequest(f"query string: {error}") from error
    options = dict(pairs)
    unknown = sorted(set(options) - {"on_missing", "dtype"})
    if unknown:
        raise BadRequest(f"unknown query parameter {clip(unknown[0])} (allowed: on_missing, dtype)")
    if len(options) < len(pairs):
        raise BadRequest("duplicate query parameter")
    on_missing, dtype = options.get("on_missing", "zero"), options.get("dtype", "float32")
    check_on_missing(on_missing)
    check_dtype(dtype)
    return on_missing, dtype


def encode(answers: list[Answer], release: str | None) -> Encoded:
    """Rows [B, D] of one table; then found bits, where an id is missing."""
    (answer,) = answers
    query, _, fetched = answer
    rows = encode_rows(fetched.vectors_BD, query.dtype)
    body = (rows,) if fetched.found_B is None else (rows, encode_found(fetched.found_B))
    return Encoded(vectors_head(OCTET_STREAM, answer, release), body, sends_rows=query.dtype == "float32")
