"""The lookup calls, answered by plain ASGI in front of FastAPI: at ten ids a route costs more than the lookup.

`HotPath.__call__` is the whole street of one request: route, read, decode, look up, encode, send. Everything that is
not a lookup goes on to the FastAPI app behind it; what these calls take and give stands in `server.openapi`.
"""

# Shapes: B ids in a request, D embedding_dim.

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import structlog

from embstore.errors import (
    BadRequest,
    BodyTooLarge,
    EmbstoreError,
    NotReady,
    UnsupportedMediaType,
)
from embstore.table import Fetched, Table
from server import codec
from server.lookup import LookupService
from server.metrics import Metrics
from server.problems import MEDIA_TYPE, problem, problem_of
from server.tables import Registry, Snapshot

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = structlog.get_logger()
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OCTETS = (b"content-type", b"application/octet-stream")
_JSON = (b"content-type", b"application/json")
_DTYPE = {name: (b"x-embedding-dtype", name.encode()) for name in codec.DTYPES}
_NONE_MISSING = (b"x-embedding-missing", b"0")
_REASONS = {
    400: "malformed",
    404: "not_found",
    405: "malformed",
    413: "too_large",
    415: "malformed",
    422: "id_out_of_range",
    500: "internal",
    503: "not_ready",
}


class Disconnected(Exception):
    """The client went away before its body was complete: nobody is left to answer."""


class HotPath:
    """ASGI app: answers lookups itself, hands everything else to `inner`."""

    def __init__(
        self,
        inner: App,
        tables: Registry,
        service: LookupService,
        metrics: Metrics,
        *,
        max_ids: int,
        max_body_bytes: int,
    ) -> None:
        self.inner, self.tables, self.service, self.lookups = inner, tables, service, metrics.lookups
        self.max_ids, self.max_body_bytes = max_ids, max_body_bytes
        self.draining = False
        self._ids = (b"%s-%x" % (prefix, n) for prefix in [secrets.token_hex(4).encode()] for n in itertools.count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, start to end."""
        if scope["type"] != "http" or not scope["path"].endswith("/lookup"):
            return await self.inner(scope, receive, send)
        parts = scope["path"].split("/")
        if not (len(parts) > 2 and parts[1] == "v1" and (_is_one(parts) or _is_many(parts))):
            return await self.inner(scope, receive, send)
        began = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = next(self._ids)
        if scope["method"] != "POST":
            detail = f"{scope['method']} is not for lookups: POST the ids"
            return await self._refuse(problem("method_not_allowed", detail, request_id.decode()), request_id, send)
        self.lookups.inflight += 1
        try:
            if parts[2] == "tables":
                await self._one(parts, scope, headers, receive, send, request_id, began)
            else:
                await self._many(parts, headers, receive, send, request_id, began)
        except EmbstoreError as error:
            await self._refuse(problem_of(error, request_id.decode()), request_id, send)
        except TypeError as error:  # ids that are not what the table's id space takes
            await self._refuse(problem("malformed_request", str(error), request_id.decode()), request_id, send)
        except Disconnected:
            pass
        except Exception:
            log.exception("lookup failed", request_id=request_id.decode(), path=scope["path"])
            detail = "the server failed to answer this request; its log has the reason under this instance"
            await self._refuse(problem("internal", detail, request_id.decode()), request_id, send)
        finally:
            self.lookups.inflight -= 1

    async def _one(
        self,
        parts: list[str],
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        request_id: bytes,
        began: float,
    ) -> None:
        """`POST /v1/tables/{table}[/versions/{n}|/labels/{name}]/lookup`."""
        snapshot = self._snapshot()
        table = _table(snapshot, parts)
        content_type = headers.get(b"content-type", b"")
        body = await self._body(headers, receive)
        if content_type == b"application/octet-stream":
            on_missing, dtype = _options(scope["query_string"])
            keys: Any = codec.decode_octets(body, table)
            protocol, wants_found = "octet-stream", False
        elif content_type.partition(b";")[0].strip().lower() == b"application/json":
            asked = codec.decode_lookup(body)
            on_missing, dtype, wants_found = asked.on_missing, asked.dtype, asked.found
            keys = codec.keys_of(asked.ids, table)
            protocol = "octet-stream" if headers.get(b"accept") == b"application/octet-stream" else "json"
        else:
            raise UnsupportedMediaType(
                f"content type {content_type.decode('latin-1')!r}: send {codec.OCTET_STREAM} or {codec.JSON}"
            )
        num_ids = len(keys)
        codec.check_count(num_ids, self.max_ids)
        fetched = await self.service.lookup(table, keys, on_missing)
        reply = self._reply_headers(snapshot, table, num_ids, fetched.missing, dtype, request_id)
        if protocol == "octet-stream":
            rows = codec.encode_rows(fetched.vectors_BD, dtype)
            bits = b"" if fetched.found_B is None else codec.encode_found(fetched.found_B)
            await _send_rows(send, reply, rows, bits)
        else:
            out = _json_table(table, fetched, dtype, wants_found)
            await _send(send, 200, [_JSON, *reply], codec.encode_json(out))
        seconds = time.perf_counter() - began
        self.lookups.count(table.name, protocol, seconds, num_ids, fetched.missing)

    async def _many(
        self,
        parts: list[str],
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        request_id: bytes,
        began: float,
    ) -> None:
        """`POST /v1/lookup`, `POST /v1/releases/{id}/lookup`: many tables, all from one release."""
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            raise UnsupportedMediaType(f"a lookup of many tables takes {codec.JSON}")
        asked = codec.decode_many(await self._body(headers, receive)).tables
        codec.check_count(sum(len(one.ids) for one in asked.values()), self.max_ids)
        release, tables = self._snapshot().together(list(asked), parts[3] if len(parts) == 5 else None)
        out = {}
        for name, one in asked.items():
            fetched = await self.service.lookup(tables[name], codec.keys_of(one.ids, tables[name]), one.on_missing)
            out[name] = _json_table(tables[name], fetched, one.dtype, one.found)
            seconds = time.perf_counter() - began
            self.lookups.count(name, "json", seconds, len(one.ids), fetched.missing)
        reply: Headers = [_JSON, (b"x-request-id", request_id)]
        if release is not None:
            reply.append((b"x-embedding-release", release.encode()))
        await _send(send, 200, self._last(reply), codec.encode_json({"release": release, "tables": out}))

    def _snapshot(self) -> Snapshot:
        """What is served now: read once, so that a swap in the middle of a request changes nothing for it."""
        if not self.tables.started:
            raise NotReady("tables are still being loaded")
        return self.tables.snapshot

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, never more of it in memory than is allowed."""
        limit = self.max_body_bytes
        claimed = headers.get(b"content-length")
        if claimed is not None and claimed.isdigit() and int(claimed) > limit:
            raise BodyTooLarge(f"the body has {int(claimed):,} bytes; the limit is {limit:,}", limit=limit)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            if len(body) > limit:
                raise BodyTooLarge(f"the body has {len(body):,} bytes; the limit is {limit:,}", limit=limit)
            return body
        chunks, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise BodyTooLarge(f"the body has more than {limit:,} bytes, which is the limit", limit=limit)
        return b"".join(chunks)

    def _reply_headers(
        self, snapshot: Snapshot, table: Table, num_ids: int, missing: int, dtype: str, request_id: bytes
    ) -> Headers:
        headers = [
            (b"x-embedding-version", b"%d" % table.version),
            (b"x-embedding-shape", b"%d,%d" % (num_ids, table.config.embedding_dim)),
            _DTYPE[dtype],
            (b"x-embedding-missing", b"%d" % missing) if missing else _NONE_MISSING,
            (b"x-request-id", request_id),
        ]
        release = snapshot.release_of.get((table.name, table.version))
        if release is not None:
            headers.append((b"x-embedding-release", release.encode()))
        return self._last(headers)

    def _last(self, headers: Headers) -> Headers:
        """While draining, ask the client to take its next request elsewhere."""
        if self.draining:
            headers.append((b"connection", b"close"))
        return headers

    async def _refuse(self, answer: tuple[int, bytes], request_id: bytes, send: Send) -> None:
        status, body = answer
        self.lookups.rejected[_REASONS[status]] += 1
        headers = [(b"content-type", MEDIA_TYPE), (b"x-request-id", request_id)]
        if status == 405:
            headers.append((b"allow", b"POST"))
        await _send(send, status, self._last(headers), body)


def _is_one(parts: list[str]) -> bool:
    """/v1/tables/{table}/lookup, /v1/tables/{table}/versions|labels/{ref}/lookup."""
    return parts[2] == "tables" and (len(parts) == 5 or (len(parts) == 7 and parts[4] in ("versions", "labels")))


def _is_many(parts: list[str]) -> bool:
    """/v1/lookup, /v1/releases/{id}/lookup."""
    return parts[2:] == ["lookup"] or (len(parts) == 5 and parts[2] == "releases")


def _table(snapshot: Snapshot, parts: list[str]) -> Table:
    """The table a path names."""
    if len(parts) == 5:
        return snapshot.table(parts[3])
    if parts[4] == "labels":
        return snapshot.table(parts[3], label=parts[5])
    if not parts[5].isdecimal() or len(parts[5]) > 18:
        raise BadRequest(f"version {parts[5][:40]!r} is not a number", table=parts[3])
    return snapshot.table(parts[3], version=int(parts[5]))


def _options(query: bytes) -> tuple[str, str]:
    """on_missing and dtype of a query string."""
    if not query:
        return "zero", "float32"
    try:
        options = dict(parse_qsl(query.decode("ascii"), keep_blank_values=True, strict_parsing=True))
    except ValueError as error:
        raise BadRequest(f"query string: {error}") from error
    unknown = set(options) - {"on_missing", "dtype"}
    if unknown:
        raise BadRequest(f"unknown query parameter {sorted(unknown)[0]!r}: there are on_missing and dtype")
    on_missing, dtype = options.get("on_missing", "zero"), options.get("dtype", "float32")
    codec.check_options(codec.LookupBody(ids=[], on_missing=on_missing, dtype=dtype))
    return on_missing, dtype


def _json_table(table: Table, fetched: Fetched, dtype: str, wants_found: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "table": table.name,
        "version": table.version,
        "embedding_dim": table.embedding_dim,
        "dtype": dtype,
        "vectors": codec.to_dtype(fetched.vectors_BD, dtype),
    }
    if fetched.found_B is not None or wants_found:
        out["found"] = np.ones(len(fetched.vectors_BD), np.bool_) if fetched.found_B is None else fetched.found_B
    return out


async def _send_rows(send: Send, headers: Headers, rows: memoryview | bytes, bits: bytes) -> None:
    length = (b"content-length", b"%d" % (len(rows) + len(bits)))
    await send({"type": "http.response.start", "status": 200, "headers": [_OCTETS, length, *headers]})
    if bits:
        await send({"type": "http.response.body", "body": rows, "more_body": True})
        rows = bits
    await send({"type": "http.response.body", "body": rows})


async def _send(send: Send, status: int, headers: Headers, body: bytes) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})
