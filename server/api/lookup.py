"""The lookup handler: one complete request in, one reply out, whatever protocol it came by.

`LookupHandler.answer` is the general way: check the call, decode it to queries, resolve tables, check limits, fetch,
encode, count. It returns the reply itself where nothing has to be waited for, which is nearly always, and an awaitable
of it otherwise. `_answer_rows` is the fast path for heads seen before.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from time import perf_counter

import numpy as np
import structlog

from embstore.errors import BadRequest, EmbstoreError, NotReady, UnsupportedMediaType
from embstore.table import Fetched, Floats, Table
from server.api.codecs import json_body, octet_stream, open_inference
from server.api.codecs.vectors import JSON, OCTET_STREAM
from server.api.planned import PlannedRows, is_plain
from server.api.query import Answer, Call, Encoded, Query, check_limits, resolve
from server.api.shared_memory import Regions
from server.http.admission import RETRY_AFTER_SECONDS
from server.http.auth import ApiKeys
from server.http.buffer_pool import Buffers
from server.http.limits import Limits
from server.http.messages import Reply, Request
from server.http.plans import Plan
from server.http.problems import MEDIA_TYPE, clip, problem, problem_of, reason_of
from server.http.routing import HEALTH, INFER, LOOKUP_MANY
from server.lookup.service import LookupService, abandon, all_of
from server.metrics.recorder import Lookups
from server.tables.health import Health
from server.tables.registry import Registry
from server.tables.snapshot import Snapshot

log = structlog.get_logger()
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON_HEAD = b"content-type: application/json\r\n"
_PROBLEM_HEAD = b"content-type: %s\r\n" % MEDIA_TYPE
SAMPLED = 16
"""One request in this many is timed stage by stage."""


@dataclass(slots=True)
class _Lookup:
    """A request on its way: decoded, its tables resolved, its rows fetched or awaited."""

    request: Request
    call: Call
    release: str | None
    tables: dict[str, Table]
    decoded: float
    fetched: list[Fetched | Awaitable[Fetched]]
    leases: list[Floats]

    def answers(self, fetched: list[Fetched]) -> list[Answer]:
        """Each query with what was found for it."""
        queries, tables = self.call.queries, self.tables
        return [Answer(query, tables[query.table], one) for query, one in zip(queries, fetched, strict=True)]


class LookupHandler:
    """Answers lookups from what is served now."""

    def __init__(
        self,
        tables: Registry,
        service: LookupService,
        lookups: Lookups,
        health: Health,
        keys: ApiKeys,
        buffers: Buffers,
        limits: Limits,
        regions: Regions,
    ) -> None:
        self.tables, self.service, self.lookups, self.health = tables, service, lookups, health
        self.keys, self.buffers, self.limits, self.regions = keys, buffers, limits, regions
        prefix = secrets.token_hex(4).encode()
        self.new_request_id = (b"%s-%x" % (prefix, n) for n in itertools.count(1)).__next__
        self._until_sample = 1

    def answer(self, request: Request) -> Reply | Awaitable[Reply]:
        """The reply to a request, or what it will be; never raises."""
        if request.route.kind == HEALTH:
            return self._probe(request)
        self.lookups.inflight[0] += 1
        request.started = perf_counter()
        try:
            if not self.keys.open:
                self.keys.check(request.headers)
            if request.method != b"POST":
                self._done()
                return self._not_allowed(request)
            if request.route.wrong:
                raise BadRequest(request.route.wrong)
            request.check_deadline()
            call = _decode(request, self.limits, self.regions)
            release, tables = resolve(call, self._snapshot())
            check_limits(call.queries, tables, self.limits)
            lookup = _Lookup(request, call, release, tables, perf_counter(), [], [])
            self._fetch(lookup)
            if any(map(isawaitable, lookup.fetched)) or _takes_long(call, tables):
                return self._answer_later(lookup)
            looked_up = perf_counter()
            answers = lookup.answers(lookup.fetched)  # type: ignore[arg-type]
            reply = self._reply(lookup, answers, looked_up, call.encode(answers, release))
        except Exception as error:
            reply = self.refuse(request, error)
        self._done()
        return reply

    def answer_planned(
        self, plan: Plan, request_id: bytes, body: bytes, began: float
    ) -> tuple[Reply | Awaitable[Reply], Request | None]:
        """The same for a request whose head was seen before, and the request where it was made."""
        rows, snapshot = plan.prepared, self.tables.snapshot
        if rows is None and is_plain(plan):
            rows = plan.prepared = PlannedRows(plan)
        try:
            if rows is not None and (rows.snapshot() is snapshot or rows.prepare(snapshot, self.service, self.limits)):
                reply = self._answer_rows(rows, body, began, began + plan.timeout_s)
                if reply is not None:
                    return reply, None
        except Exception as error:
            return self.refuse(Request(b"POST", plan.route, plan.headers, body, request_id, began), error), None
        request = Request(b"POST", plan.route, plan.headers, body, request_id, began)
        request.deadline = began + plan.timeout_s
        return self.answer(request), request

    def _answer_rows(self, rows: PlannedRows, body: bytes, began: float, deadline: float) -> Reply | None:
        """A plain lookup of float32 rows, all found, straight from body to reply; None: it takes the general way."""
        table = rows.table()
        if table is None or not rows.is_direct():
            return None
        ids_B, missing = table.ids.rows_of(np.frombuffer(body, np.int64))
        decoded = perf_counter()
        if missing or decoded > deadline:
            return None
        out_BD = rows.out_BD
        leases: tuple[Floats, ...] = ()
        if out_BD is None:
            out_BD, lease = self.buffers.take(rows.num_ids, rows.embedding_dim)
            leases = (lease,)
        table.compose(ids_B, out_BD)
        now = perf_counter()
        if now > deadline:
            self.buffers.give_back(leases)
            return None
        self.lookups.count(table.name, octet_stream.PROTOCOL, now - began, rows.num_ids, 0)
        self._until_sample -= 1
        if self._until_sample == 0:
            self._sample({"queue": 0.0, "decode": decoded - began, "lookup": now - decoded, "encode": 0.0})
        return Reply(200, rows.head, (rows.data or out_BD.data.cast("B"),), leases)

    async def _answer_later(self, lookup: _Lookup) -> Reply:
        """The same from the fetch on, where that has to be waited for, or where the reply is long."""
        try:
            answers = lookup.answers(await all_of(lookup.fetched))
            looked_up = perf_counter()
            encode, long = lookup.call.encode, _takes_long(lookup.call, lookup.tables)
            encoded = (
                await self.service.do(encode, answers, lookup.release) if long else encode(answers, lookup.release)
            )
            return self._reply(lookup, answers, looked_up, encoded)
        except Exception as error:
            return self.refuse(lookup.request, error)
        finally:
            self._done()

    def _fetch(self, lookup: _Lookup) -> None:
        """Look every query up, in memory lent for the reply where it takes one row an id."""
        fetched, service = lookup.fetched, self.service
        try:
            for query in lookup.call.queries:
                table = lookup.tables[query.table]
                ids = query.ids_for(table)
                if query.bags is not None:
                    fetched.append(service.lookup_bags(table, ids, query.on_missing, query.bags))
                    continue
                out_BD, lease = self.buffers.take(len(ids), table.embedding_dim)
                lookup.leases.append(lease)
                fetched.append(service.lookup(table, ids, query.on_missing, out_BD))
        except Exception:
            abandon(fetched)
            raise

    def _reply(self, lookup: _Lookup, answers: list[Answer], looked_up: float, encoded: Encoded) -> Reply:
        """The reply that carries the vectors; everything about the request is known now, so it is counted here."""
        request, head, leases = lookup.request, encoded.head, lookup.leases
        if not encoded.sends_rows:
            self.buffers.give_back(leases)
            leases = []
        request.check_deadline()
        now = perf_counter()
        for query, table, fetched in answers:
            protocol, seconds = lookup.call.protocol, now - request.began
            self.lookups.count(table.name, protocol, seconds, len(query.ids), fetched.missing)
        self._until_sample -= 1
        if self._until_sample == 0 or b"x-timing" in request.headers:
            head += self._timed(request, lookup.decoded, looked_up, now)
        return Reply(200, head, encoded.body, leases)

    def _timed(self, request: Request, decoded: float, looked_up: float, encoded: float) -> bytes:
        """Stages of this request into the histograms; its Server-Timing header where the request wants it."""
        stages = {
            "queue": request.started - request.began,
            "decode": decoded - request.started,
            "lookup": looked_up - decoded,
            "encode": encoded - looked_up,
        }
        if self._until_sample == 0:
            self._sample(stages)
        if request.headers.get(b"x-timing") != b"1":
            return b""
        timings = ", ".join(f"{stage};dur={seconds * 1e3:.3f}" for stage, seconds in stages.items())
        return b"server-timing: %s\r\n" % timings.encode()

    def _sample(self, stages: Mapping[str, float]) -> None:
        """The stages of one request, into the histograms."""
        self._until_sample = SAMPLED
        for stage, seconds in stages.items():
            self.lookups.stage(stage, seconds)

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

    def drain(self) -> None:
        """The server is on its way down: probes say so."""
        self.health.draining = True

    def forget(self) -> None:
        """Count a request whose client went away while it waited: nothing is looked up."""
        self.lookups.reject("disconnected")

    def request_id(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The caller's request id, or a new one."""
        given = headers.get(b"x-request-id")
        return given if given is not None and _REQUEST_ID.fullmatch(given) else self.new_request_id()

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
        detail = f"{method} is not allowed for this call (allowed: {allowed.decode()})"
        on_v2 = request.route.on_v2
        status, body = problem("method_not_allowed", detail, request.id.decode(), on_v2=on_v2)
        if allowed == b"POST":
            self.lookups.reject("malformed")
        return Reply(status, _PROBLEM_HEAD + b"allow: %s\r\n" % allowed, (body,))

    def _done(self) -> None:
        self.lookups.inflight[0] -= 1


def media_type(headers: Mapping[bytes, bytes]) -> str:
    """The body's media type without parameters, in lower case."""
    given = headers.get(b"content-type", b"")
    return given.partition(b";")[0].strip().lower().decode("latin-1")


def _decode(request: Request, limits: Limits, regions: Regions) -> Call:
    """What a request asks, by the codec of its route and media type."""
    kind = request.route.kind
    if kind == INFER:
        return open_inference.decode(request, limits, regions)
    given = media_type(request.headers)
    if kind == LOOKUP_MANY:
        if given == JSON:
            return json_body.decode_many(request, limits)
        raise UnsupportedMediaType(f"content type {clip(given)}: a lookup of many tables takes {JSON}")
    if given == OCTET_STREAM:
        return octet_stream.decode(request, limits)
    if given == JSON:
        return json_body.decode_one(request, limits)
    raise UnsupportedMediaType(f"content type {clip(given)}: send {OCTET_STREAM} or {JSON}")


def _takes_long(call: Call, tables: dict[str, Table]) -> bool:
    """Whether encoding the vectors would hold the event loop up."""

    def size(query: Query) -> int:
        return query.num_rows * tables[query.table].embedding_dim

    return call.inline_numbers is not None and sum(map(size, call.queries)) > call.inline_numbers
