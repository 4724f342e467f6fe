"""The request street: one complete call in, one reply out, whatever carries them.

`Street.answer` is the whole story of a lookup: find the table, decode, look up, encode, count. It returns the reply
itself where nothing has to be waited for, which is nearly always, and an awaitable of it otherwise.
"""

# Shapes: B ids in a request, G bags of them, D embedding_dim.

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any

import structlog

from embstore.errors import BadRequest, EmbstoreError, NotReady, UnsupportedMediaType
from embstore.ids import Ids as Keys
from embstore.pooling import Bags
from embstore.table import Fetched, Table
from server.api.codecs import json as codec
from server.http.admission import RETRY_AFTER_SECONDS
from server.http.auth import Keys as ApiKeys
from server.http.buffer_pool import Buffers
from server.http.messages import Reply, Request
from server.http.problems import MEDIA_TYPE, clip, problem, problem_of, reason_of
from server.http.routing import HEALTH, INFER, LOOKUP
from server.lookup.service import LookupService, abandon, all_of
from server.metrics.recorder import Lookups
from server.tables.health import Health
from server.tables.registry import Registry, Snapshot

log = structlog.get_logger()
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_OCTETS = b"application/octet-stream"
_JSON_HEAD = b"content-type: application/json\r\n"
_VECTORS_HEAD = (
    b"content-type: %s\r\nx-embedding-version: %d\r\nx-embedding-shape: %d,%d\r\nx-embedding-dtype: %s\r\n"
    b"x-embedding-missing: %d\r\n"
)
_PROBLEM_HEAD = b"content-type: %s\r\n" % MEDIA_TYPE
SAMPLED = 16
"""Of so many requests one is timed stage by stage."""


@dataclass(frozen=True)
class Limits:
    """What one request, and one connection, may ask for."""

    max_ids: int
    max_body_bytes: int
    max_reply_bytes: int
    max_connections: int
    request_seconds: float
    keepalive_seconds: float
    shutdown_seconds: float


@dataclass(slots=True)
class _Asked:
    """A lookup of one table, decoded."""

    table: Table
    keys: Keys
    on_missing: str
    dtype: str
    protocol: str
    """How the reply is written."""
    wants_found: bool = False
    bags: Bags | None = None


class Street:
    """Answers calls of the request street from what is served now."""

    def __init__(
        self,
        tables: Registry,
        service: LookupService,
        lookups: Lookups,
        health: Health,
        keys: ApiKeys,
        buffers: Buffers,
        limits: Limits,
        inference: Any = None,
    ) -> None:
        self.tables, self.service, self.lookups, self.health = tables, service, lookups, health
        self.keys, self.buffers, self.limits = keys, buffers, limits
        self.inference = inference
        self._ids = (b"%s-%x" % (prefix, n) for prefix in [secrets.token_hex(4).encode()] for n in itertools.count(1))
        self._until_sample = 1

    def answer(self, request: Request) -> Reply | Awaitable[Reply]:
        """The reply to a request, or what it will be; never raises."""
        route = request.route
        if route.kind == HEALTH:
            return self._probe(request)
        self.lookups.inflight[0] += 1
        request.started = time.perf_counter()
        try:
            if not self.keys.open:
                self.keys.check(request.headers)
            if request.method != b"POST":
                self._done()
                return self._not_allowed(request)
            if route.wrong:
                raise BadRequest(route.wrong)
            request.check_deadline()
            if route.kind == LOOKUP:
                reply = self._one(request)
            elif route.kind == INFER:
                reply = self.inference.answer(request, self._snapshot())
            else:
                reply = self._many(request)
        except Exception as error:
            self._done()
            return self.refuse(request, error)
        if type(reply) is Reply:
            self._done()
            return reply if route.kind == LOOKUP else _with_timing(request, reply)
        return self._later(request, reply)  # type: ignore[arg-type]

    async def _later(self, request: Request, reply: Awaitable[Reply]) -> Reply:
        try:
            answer = await reply
            return answer if request.route.kind == LOOKUP else _with_timing(request, answer)
        except Exception as error:
            return self.refuse(request, error)
        finally:
            self._done()

    def refuse(self, request: Request, error: Exception) -> Reply:
        """The reply to a request that ends in an error, counted."""
        if isinstance(error, EmbstoreError):
            self.lookups.reject(reason_of(error.code))
            status, body = problem_of(error, request.id.decode(), on_v2=request.route.on_v2)
            retry_after = error.facts.get("retry_after", RETRY_AFTER_SECONDS if error.code == "overloaded" else None)
            extra = b"retry-after: %d\r\n" % retry_after if isinstance(retry_after, int) else b""
            if status == 401:
                extra = b'www-authenticate: Bearer realm="embstore"\r\n'
            return Reply(status, _PROBLEM_HEAD + extra, (body,))
        self.lookups.reject("internal")
        log.error("lookup failed", request_id=request.id.decode(), route=request.route, exc_info=error)
        detail = "the server failed to answer this request; its log has the reason under this instance"
        status, body = problem("internal", detail, request.id.decode(), on_v2=request.route.on_v2)
        return Reply(status, _PROBLEM_HEAD, (body,))

    def forget(self) -> None:
        """A request whose client went away while it waited: nothing is looked up."""
        self.lookups.reject("disconnected")

    def request_id(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The caller's request id, or a new one."""
        given = headers.get(b"x-request-id")
        return given if given is not None and _REQUEST_ID.fullmatch(given) else next(self._ids)

    def _one(self, request: Request) -> Reply | Awaitable[Reply]:
        """`POST /v1/tables/{table}[/versions/{n}|/labels/{name}]/lookup`."""
        route = request.route
        snapshot = self._snapshot()
        asked = self._decode(request, snapshot.table(route.table, version=route.version, label=route.label))
        decoded = time.perf_counter()
        if asked.bags is not None:
            fetched: Any = self.service.lookup_bags(asked.table, asked.keys, asked.on_missing, asked.bags)
            lent = None
        else:
            out, lent = self.buffers.take(len(asked.keys), asked.table.embedding_dim)
            fetched = self.service.lookup(asked.table, asked.keys, asked.on_missing, out)
        if type(fetched) is Fetched and not _takes_long(asked, fetched):
            looked_up = time.perf_counter()
            return self._reply(request, snapshot, asked, fetched, lent, (decoded, looked_up), _encoded(asked, fetched))
        return self._one_later(request, snapshot, asked, fetched, lent, decoded)

    async def _one_later(
        self, request: Request, snapshot: Snapshot, asked: _Asked, fetched: Any, lent: Any, decoded: float
    ) -> Reply:
        done: Fetched = await fetched if isawaitable(fetched) else fetched
        times = decoded, time.perf_counter()
        long = _takes_long(asked, done)
        body = await self.service.do(_encoded, asked, done) if long else _encoded(asked, done)
        return self._reply(request, snapshot, asked, done, lent, times, body)

    def _decode(self, request: Request, table: Table) -> _Asked:
        """What the body asks of a table, within the limits."""
        headers = request.headers
        content_type = media_type(headers)
        if content_type == _OCTETS:
            on_missing, dtype = codec.decode_query(request.route.query)
            keys = codec.decode_octets(request.body, table)
            self._check_count(table, len(keys))
            return _Asked(table, keys, on_missing, dtype, "octet-stream")
        if content_type != b"application/json":
            given = clip(content_type.decode("latin-1"))
            raise UnsupportedMediaType(f"content type {given}: send {codec.OCTET_STREAM} or {codec.JSON}")
        codec.refuse_query(request.route.query)
        body = codec.decode_lookup(request.body)
        bags = codec.bags_of(body, table.name)
        self._check_count(table, len(body.ids), bags)
        protocol = "octet-stream" if _OCTETS in headers.get(b"accept", b"") else "json"
        if protocol == "json":
            codec.check_json_dtype(body.dtype)
        return _Asked(table, codec.keys_of(body.ids, table), body.on_missing, body.dtype, protocol, body.found, bags)

    def _reply(
        self,
        request: Request,
        snapshot: Snapshot,
        asked: _Asked,
        fetched: Fetched,
        lent: Any,
        times: tuple[float, float],
        body: tuple[Any, ...],
    ) -> Reply:
        """The reply that carries the vectors; everything about the request is known now, so it is counted here."""
        table, num_ids = asked.table, len(asked.keys)
        release = snapshot.release_of.get((table.name, table.version))
        head = _VECTORS_HEAD % (
            _OCTETS if asked.protocol == "octet-stream" else b"application/json",
            table.version,
            len(fetched.vectors_BD),
            table.embedding_dim,
            asked.dtype.encode(),
            fetched.missing,
        )
        if release is not None:
            head += b"x-embedding-release: %s\r\n" % release.encode()
        if lent is not None and (asked.protocol == "json" or asked.dtype != "float32"):
            self.buffers.give_back(lent)
            lent = None
        request.check_deadline()
        now = time.perf_counter()
        self.lookups.count(table.name, asked.protocol, now - request.began, num_ids, fetched.missing)
        self._until_sample -= 1
        if self._until_sample == 0 or b"x-timing" in request.headers:
            head += self._timed(request, *times, now)
        return Reply(200, head, body, lent)

    def _timed(self, request: Request, decoded: float, looked_up: float, encoded: float) -> bytes:
        """Stages of this request into the histograms; its Server-Timing header where it was asked for."""
        stages = {
            "queue": request.started - request.began,
            "decode": decoded - request.started,
            "lookup": looked_up - decoded,
            "encode": encoded - looked_up,
        }
        if self._until_sample == 0:
            self._until_sample = SAMPLED
            for stage, seconds in stages.items():
                self.lookups.stage(stage, seconds)
        if request.headers.get(b"x-timing") != b"1":
            return b""
        timings = ", ".join(f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in stages.items())
        return b"server-timing: %s\r\n" % timings.encode()

    def _many(self, request: Request) -> Reply | Awaitable[Reply]:
        """`POST /v1/lookup`, `POST /v1/releases/{id}/lookup`: many tables, all from one release."""
        if media_type(request.headers) != b"application/json":
            raise UnsupportedMediaType(f"a lookup of many tables takes {codec.JSON}")
        codec.refuse_query(request.route.query)
        bodies = codec.decode_many(request.body).tables
        release, tables = self._snapshot().together(list(bodies), request.route.release)
        bags_of = {name: codec.bags_of(body, name) for name, body in bodies.items()}
        self._check_counts(tables, bodies, bags_of)
        asked: list[_Asked] = []
        fetched: list[Any] = []
        try:
            for name, body in bodies.items():
                table, bags = tables[name], bags_of[name]
                codec.check_json_dtype(body.dtype)
                keys = codec.keys_of(body.ids, table)
                asked.append(_Asked(table, keys, body.on_missing, body.dtype, "json", body.found, bags))
                if bags is None:
                    fetched.append(self.service.lookup(table, keys, body.on_missing))
                else:
                    fetched.append(self.service.lookup_bags(table, keys, body.on_missing, bags))
        except Exception:
            abandon(fetched)
            raise
        if any(map(isawaitable, fetched)) or any(map(_takes_long, asked, fetched)):
            return self._many_later(request, release, asked, fetched)
        return self._reply_many(request, release, asked, fetched, _encoded_many(release, asked, fetched))

    async def _many_later(
        self, request: Request, release: str | None, asked: list[_Asked], fetched: list[Any]
    ) -> Reply:
        done = await all_of(fetched)
        body = await self.service.do(_encoded_many, release, asked, done)
        return self._reply_many(request, release, asked, done, body)

    def _reply_many(
        self, request: Request, release: str | None, asked: list[_Asked], fetched: list[Fetched], body: tuple[Any, ...]
    ) -> Reply:
        request.check_deadline()
        now = time.perf_counter()
        for one, vectors in zip(asked, fetched, strict=True):
            self.lookups.count(one.table.name, "json", now - request.began, len(one.keys), vectors.missing)
        head = _JSON_HEAD if release is None else _JSON_HEAD + b"x-embedding-release: %s\r\n" % release.encode()
        return Reply(200, head, body)

    def _check_counts(
        self, tables: Mapping[str, Table], bodies: Mapping[str, codec.LookupBody], bags_of: Mapping[str, Bags | None]
    ) -> None:
        """TooManyIds when the tables together ask for more than one request may."""
        limits = self.limits
        num_rows = {name: bags.num_bags if bags else len(bodies[name].ids) for name, bags in bags_of.items()}
        codec.check_count(sum(len(one.ids) for one in bodies.values()), limits.max_ids)
        codec.check_count(sum(num_rows.values()), limits.max_ids, "rows asked for")
        num_bytes = sum(4 * num_rows[name] * tables[name].embedding_dim for name in bodies)
        codec.check_reply(num_bytes, limits.max_reply_bytes)

    def _check_count(self, table: Table, num_ids: int, bags: Bags | None = None) -> None:
        """TooManyIds when there are more than a request may ask for, or than a reply has room for."""
        limits = self.limits
        num_rows, what = num_ids, "ids"
        if bags is not None:
            codec.check_count(num_ids, limits.max_ids)
            num_rows, what = bags.num_bags, "bags"
        if num_rows > limits.max_ids or num_rows * 4 * table.embedding_dim > limits.max_reply_bytes:
            codec.check_count(num_rows, min(limits.max_ids, limits.max_reply_bytes // (4 * table.embedding_dim)), what)

    def _snapshot(self) -> Snapshot:
        """What is served now: read once, so that a swap in the middle of a request changes nothing for it."""
        if not self.tables.started:
            raise NotReady("tables are still being loaded")
        return self.tables.snapshot

    def _probe(self, request: Request) -> Reply:
        """/livez, /readyz, /startupz: answered from what is known, at once."""
        if request.method not in (b"GET", b"HEAD"):
            return self._not_allowed(request, b"GET, HEAD")
        status, body = self.health.answer(request.route.table)
        return Reply(status, _JSON_HEAD, (body,))

    def _not_allowed(self, request: Request, allowed: bytes = b"POST") -> Reply:
        method = request.method.decode("latin-1")
        detail = f"{method} is not for this call; {allowed.decode()} is"
        on_v2 = request.route.on_v2
        status, body = problem("method_not_allowed", detail, request.id.decode(), on_v2=on_v2)
        if allowed == b"POST":
            self.lookups.reject("malformed")
        return Reply(status, _PROBLEM_HEAD + b"allow: %s\r\n" % allowed, (body,))

    def _done(self) -> None:
        self.lookups.inflight[0] -= 1


def _with_timing(request: Request, reply: Reply) -> Reply:
    """The reply with what is known of its times, where that was asked for: calls of many parts have no stages."""
    if request.headers.get(b"x-timing") != b"1":
        return reply
    queued, whole = request.started - request.began, time.perf_counter() - request.began
    timing = b"server-timing: queue;dur=%.3f, total;dur=%.3f\r\n" % (queued * 1e3, whole * 1e3)
    return reply._replace(head=reply.head + timing)


def media_type(headers: Mapping[bytes, bytes]) -> bytes:
    """The body's media type without parameters, in lower case."""
    given = headers.get(b"content-type", b"")
    return given if given == _OCTETS else given.partition(b";")[0].strip().lower()


def _takes_long(asked: _Asked, fetched: Any) -> bool:
    """Whether writing the vectors as JSON would hold the event loop up."""
    return asked.protocol == "json" and type(fetched) is Fetched and fetched.vectors_BD.size > codec.LONG_NUMBERS


def _encoded(asked: _Asked, fetched: Fetched) -> tuple[Any, ...]:
    """The body of a reply of one table."""
    if asked.protocol == "json":
        texts: list[memoryview] = []
        return codec.encode_json(_json_table(asked, fetched, texts), texts)
    rows = codec.encode_rows(fetched.vectors_BD, asked.dtype)
    return (rows,) if fetched.found_B is None else (rows, codec.encode_found(fetched.found_B))


def _encoded_many(release: str | None, asked: list[_Asked], fetched: list[Fetched]) -> tuple[Any, ...]:
    """The body of a reply of many tables."""
    texts: list[memoryview] = []
    tables = {one.table.name: _json_table(one, vectors, texts) for one, vectors in zip(asked, fetched, strict=True)}
    return codec.encode_json({"release": release, "tables": tables}, texts)


def _json_table(asked: _Asked, fetched: Fetched, texts: list[memoryview]) -> dict[str, Any]:
    table, found_B, num_ids = asked.table, fetched.found_B, len(asked.keys)
    return codec.json_table(
        table.name, table.version, asked.dtype, fetched.vectors_BD, found_B, num_ids, asked.wants_found, texts
    )
