"""The lookup calls, answered by plain ASGI in front of FastAPI: at ten ids a route costs more than the lookup.

`HotPath.__call__` is the whole street of one request: route, read, decode, look up, encode, send. Everything that is
not a lookup goes on to the FastAPI app behind it; what these calls take and give stands in `server.openapi`.
"""

# Shapes: B ids in a request, G bags of them, D embedding_dim.

from __future__ import annotations

import asyncio
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
    Draining,
    EmbstoreError,
    NotReady,
    TooManyIds,
    UnsupportedMediaType,
)
from embstore.files import NUMBER
from embstore.pooling import Bags
from embstore.table import Fetched, Table
from server import codec
from server.lookup import LookupService
from server.metrics import Metrics
from server.problems import MEDIA_TYPE, clip, problem, problem_of
from server.protocol import REPLY
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
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: %d\r\nx-embedding-version: %d\r\n"
    b"x-embedding-shape: %d,%d\r\nx-embedding-dtype: %s\r\nx-embedding-missing: %d\r\n"
)
_NOTHING: Mapping[str, Any] = {}
_REASONS = {
    "table_not_found": "not_found",
    "version_not_found": "not_found",
    "label_not_found": "not_found",
    "release_not_found": "not_found",
    "too_many_ids": "too_large",
    "body_too_large": "too_large",
    "id_out_of_range": "id_out_of_range",
    "not_ready": "not_ready",
    "draining": "draining",
    "internal": "internal",
}
"""What a problem counts as; whatever is not here is the request's own fault: malformed."""


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
        max_reply_bytes: int,
    ) -> None:
        self.inner, self.tables, self.service, self.lookups = inner, tables, service, metrics.lookups
        self.max_ids, self.max_body_bytes, self.max_reply_bytes = max_ids, max_body_bytes, max_reply_bytes
        self.draining = False
        self._ids = (b"%s-%x" % (prefix, n) for prefix in [secrets.token_hex(4).encode()] for n in itertools.count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, start to end."""
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = next(self._ids)
        parts = scope["path"].split("/")
        if parts[-1] != "lookup" or parts[1] != "v1" or not (_is_one(parts) or _is_many(parts)):
            return await self._inner(scope, receive, send, request_id)
        if scope["method"] != "POST":
            detail = f"{scope['method']} is not for lookups: POST the ids"
            answer = problem("method_not_allowed", detail, request_id.decode())
            return await self._refuse("method_not_allowed", answer, request_id, send)
        began = time.perf_counter()
        self.lookups.inflight += 1
        try:
            if parts[2] == "tables":
                await self._one(parts, scope, headers, receive, send, request_id, began)
            else:
                await self._many(parts, scope, headers, receive, send, request_id, began)
        except EmbstoreError as error:
            await self._refuse(error.code, problem_of(error, request_id.decode()), request_id, send)
        except Disconnected:
            pass
        except Exception:
            log.exception("lookup failed", request_id=request_id.decode(), path=scope["path"])
            detail = "the server failed to answer this request; its log has the reason under this instance"
            await self._refuse("internal", problem("internal", detail, request_id.decode()), request_id, send)
        finally:
            self.lookups.inflight -= 1

    async def _inner(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        """FastAPI's part of the work, with the request's id in its reply too."""
        scope["request_id"] = request_id.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._last([*message["headers"], (b"x-request-id", request_id)])}
            await send(message)

        await self.inner(scope, receive, named)

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
        content_type = _media_type(headers)
        body = await self._body(headers, receive)
        snapshot = self._snapshot()
        table = _table(snapshot, parts)
        bags = None
        if content_type == b"application/octet-stream":
            on_missing, dtype = _options(scope["query_string"])
            keys: Any = codec.decode_octets(body, table)
            self._check_count(table, len(keys))
            protocol, wants_found = "octet-stream", False
        elif content_type == b"application/json":
            _no_query(scope["query_string"])
            asked = codec.decode_lookup(body)
            on_missing, dtype, wants_found = asked.on_missing, asked.dtype, asked.found
            bags = codec.bags_of(asked, table.name)
            self._check_count(table, len(asked.ids), bags)
            keys = codec.keys_of(asked.ids, table)
            protocol = "octet-stream" if b"application/octet-stream" in headers.get(b"accept", b"") else "json"
        else:
            given = clip(content_type.decode("latin-1"))
            raise UnsupportedMediaType(f"content type {given}: send {codec.OCTET_STREAM} or {codec.JSON}")
        num_rows = num_ids = len(keys)
        if bags is None:
            fetched = await self.service.lookup(table, keys, on_missing)
        else:
            fetched, num_rows = await self.service.lookup_bags(table, keys, on_missing, bags), bags.num_bags
        release = snapshot.release_of.get((table.name, table.version))
        if protocol == "octet-stream":
            rows = codec.encode_rows(fetched.vectors_BD, dtype)
            bits = b"" if fetched.found_B is None else codec.encode_found(fetched.found_B)
            reply = scope.get("extensions", _NOTHING).get(REPLY)
            if reply is not None:
                size = len(rows) + len(bits)
                head = _HEAD % (size, table.version, num_rows, table.embedding_dim, dtype.encode(), fetched.missing)
                head += b"x-embedding-release: %s\r\n" % release.encode() if release else b""
                await reply(head + b"x-request-id: %s\r\n" % request_id, rows, bits, close=self.draining)
            else:
                headers_out = self._reply_headers(table, release, num_rows, fetched.missing, dtype, request_id)
                await _send_rows(send, headers_out, rows, bits)
        else:
            headers_out = self._reply_headers(table, release, num_rows, fetched.missing, dtype, request_id)
            out = _json_table(table, fetched, num_ids, dtype, wants_found)
            await _send(send, 200, [_JSON, *headers_out], codec.encode_json(out))
        seconds = time.perf_counter() - began
        self.lookups.count(table.name, protocol, seconds, num_ids, fetched.missing)

    async def _many(
        self,
        parts: list[str],
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        request_id: bytes,
        began: float,
    ) -> None:
        """`POST /v1/lookup`, `POST /v1/releases/{id}/lookup`: many tables, all from one release."""
        if _media_type(headers) != b"application/json":
            raise UnsupportedMediaType(f"a lookup of many tables takes {codec.JSON}")
        _no_query(scope["query_string"])
        asked = codec.decode_many(await self._body(headers, receive)).tables
        release, tables = self._snapshot().together(list(asked), parts[3] if len(parts) == 5 else None)
        bags_of = {name: codec.bags_of(one, name) for name, one in asked.items()}
        num_rows = {name: bags.num_bags if bags else len(asked[name].ids) for name, bags in bags_of.items()}
        codec.check_count(sum(len(one.ids) for one in asked.values()), self.max_ids)
        codec.check_count(sum(num_rows.values()), self.max_ids, "rows asked for")
        num_bytes = sum(4 * num_rows[name] * tables[name].embedding_dim for name in asked)
        if num_bytes > self.max_reply_bytes:
            limit = self.max_reply_bytes
            raise TooManyIds(f"these ids make a reply of {num_bytes:,} bytes; the limit is {limit:,}", limit=limit)
        out = {}
        for name, one in asked.items():
            table, bags = tables[name], bags_of[name]
            keys = codec.keys_of(one.ids, table)
            if bags is None:
                fetched = await self.service.lookup(table, keys, one.on_missing)
            else:
                fetched = await self.service.lookup_bags(table, keys, one.on_missing, bags)
            out[name] = _json_table(table, fetched, len(keys), one.dtype, one.found)
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

    def _check_count(self, table: Table, num_ids: int, bags: Bags | None = None) -> None:
        """TooManyIds when there are more than a request may ask for, or than a reply has room for."""
        num_rows, what = num_ids, "ids"
        if bags is not None:
            codec.check_count(num_ids, self.max_ids)
            num_rows, what = bags.num_bags, "bags"
        if num_rows > self.max_ids or num_rows * 4 * table.embedding_dim > self.max_reply_bytes:
            codec.check_count(num_rows, min(self.max_ids, self.max_reply_bytes // (4 * table.embedding_dim)), what)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, never more of it in memory than is allowed."""
        limit = self.max_body_bytes
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedMediaType("the body has a Content-Encoding; send it as it is")
        claimed = headers.get(b"content-length", b"")
        size = int(claimed) if claimed.isdigit() else None
        if size is not None and size > limit:
            raise BodyTooLarge(f"the body has {size:,} bytes; the limit is {limit:,}", limit=limit)
        body, more = await _receive_part(receive)
        if more:
            chunks, num_bytes = [body], len(body)
            while more:
                part, more = await _receive_part(receive)
                chunks.append(part)
                num_bytes += len(part)
                if num_bytes > limit:
                    raise BodyTooLarge(f"the body has more than {limit:,} bytes, which is the limit", limit=limit)
            body = b"".join(chunks)
        if size is not None and len(body) != size:
            raise BadRequest(
                f"{len(body):,} bytes of the body arrived, Content-Length says {size:,}; "
                "a request that asks for an Upgrade loses its body"
            )
        if len(body) > limit:
            raise BodyTooLarge(f"the body has {len(body):,} bytes; the limit is {limit:,}", limit=limit)
        return body

    def _reply_headers(
        self, table: Table, release: str | None, num_ids: int, missing: int, dtype: str, request_id: bytes
    ) -> Headers:
        """What _HEAD says, as ASGI has it."""
        headers = [
            (b"x-embedding-version", b"%d" % table.version),
            (b"x-embedding-shape", b"%d,%d" % (num_ids, table.embedding_dim)),
            (b"x-embedding-dtype", dtype.encode()),
            (b"x-embedding-missing", b"%d" % missing),
            (b"x-request-id", request_id),
        ]
        if release is not None:
            headers.append((b"x-embedding-release", release.encode()))
        return self._last(headers)

    def _last(self, headers: Headers) -> Headers:
        """While draining, ask the client to take its next request elsewhere."""
        if self.draining:
            headers.append((b"connection", b"close"))
        return headers

    async def _refuse(self, code: str, answer: tuple[int, bytes], request_id: bytes, send: Send) -> None:
        status, body = answer
        self.lookups.rejected[_REASONS.get(code, "malformed")] += 1
        headers = [(b"content-type", MEDIA_TYPE), (b"x-request-id", request_id)]
        if status == 405:
            headers.append((b"allow", b"POST"))
        await _send(send, status, self._last(headers), body)


async def _receive_part(receive: Receive) -> tuple[bytes, bool]:
    """The next part of a body, and whether there is more."""
    try:
        message = await receive()
    except asyncio.CancelledError:
        raise Draining("the server is shutting down and the request is not complete") from None
    if message["type"] == "http.disconnect":
        raise Disconnected
    return message.get("body", b""), message.get("more_body", False)


def _media_type(headers: Mapping[bytes, bytes]) -> bytes:
    """The body's media type without parameters, in lower case."""
    if headers.get(b"content-type") == b"application/octet-stream":
        return b"application/octet-stream"
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower()


def _is_one(parts: list[str]) -> bool:
    """/v1/tables/{table}/lookup, /v1/tables/{table}/versions|labels/{ref}/lookup."""
    shaped = len(parts) == 5 or (len(parts) == 7 and parts[4] in ("versions", "labels"))
    return shaped and parts[2] == "tables"


def _is_many(parts: list[str]) -> bool:
    """/v1/lookup, /v1/releases/{id}/lookup."""
    return parts[2:] == ["lookup"] or (len(parts) == 5 and parts[2] == "releases")


def _table(snapshot: Snapshot, parts: list[str]) -> Table:
    """The table a path names."""
    if len(parts) == 5:
        return snapshot.table(parts[3])
    if parts[4] == "labels":
        return snapshot.table(parts[3], label=parts[5])
    if not NUMBER.fullmatch(parts[5]):
        raise BadRequest(f"version {clip(parts[5])} is not a version number", table=parts[3])
    return snapshot.table(parts[3], version=int(parts[5]))


def _options(query: bytes) -> tuple[str, str]:
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
        raise BadRequest(f"unknown query parameter {clip(unknown[0])}: there are on_missing and dtype")
    if len(options) < len(pairs):
        raise BadRequest("a query parameter is given twice")
    on_missing, dtype = options.get("on_missing", "zero"), options.get("dtype", "float32")
    codec.check_options(codec.LookupBody(ids=[], on_missing=on_missing, dtype=dtype))
    return on_missing, dtype


def _no_query(query: bytes) -> None:
    """BadRequest when options of a JSON call stand where nobody reads them."""
    if query:
        raise BadRequest("a JSON lookup takes on_missing and dtype in its body, not in the query string")


def _json_table(table: Table, fetched: Fetched, num_ids: int, dtype: str, wants_found: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "table": table.name,
        "version": table.version,
        "embedding_dim": table.embedding_dim,
        "dtype": dtype,
        "vectors": codec.to_dtype(fetched.vectors_BD, dtype),
    }
    if fetched.found_B is not None or wants_found:
        out["found"] = np.ones(num_ids, np.bool_) if fetched.found_B is None else fetched.found_B
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
