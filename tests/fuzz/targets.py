"""What fuzzing calls: bytes of any kind go in, and anything but an answer or a clear refusal is a crash."""

# Shapes: B ids.

from __future__ import annotations

import asyncio
import atexit
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
from support.wire import Wire, without_times

import embstore
from embstore.errors import EmbstoreError
from embstore.table import Table
from server.api.codecs import json_body, octet_stream, open_inference, tensors
from server.api.lookup import LookupHandler
from server.api.shared_memory import Access, Regions
from server.http import routing
from server.http.admission import Admission
from server.http.auth import ApiKeys
from server.http.buffer_pool import Buffers
from server.http.limits import Limits
from server.http.messages import Reply, Request, deadline_of
from server.http.outbox import Outbox
from server.http.problems import KINDS
from server.http.routing import INFER, LOOKUP, LOOKUP_MANY, Route
from server.http.services import Services
from server.lookup.service import LookupService
from server.metrics.recorder import Metrics
from server.tables.snapshot import Snapshot

NUM, DIM, MAX_IDS = 50, 4, 64
NAMES = [f"sku-{row}" for row in range(NUM)]
TABLE_VD = np.arange(NUM * DIM, dtype=np.float32).reshape(NUM, DIM)
_HEAD = re.compile(rb"(?:[a-z0-9-]+: [\x20-\x7e]+\r\n)*")


@cache
def tables() -> dict[str, Table]:
    """One table under each kind of ids: 0..49, sparse integers, strings."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = embstore.open_store(folder.name)
    ids: dict[str, Any] = {"dense": None, "sparse": [row * 1_000_003 - 7 for row in range(NUM)], "named": NAMES}
    release = store.publish_release({name: embstore.Publication(TABLE_VD, ids=keys) for name, keys in ids.items()})
    return {name: store.load(name, version=version) for name, version in release.tables.items()}


LIMITS = Limits(
    max_ids=MAX_IDS,
    max_body_bytes=1 << 20,
    max_reply_bytes=1 << 20,
    max_connections=1,
    request_seconds=1,
    keepalive_seconds=1,
    shutdown_seconds=1,
)


KEYS = ApiKeys([], [], host="127.0.0.1")


@cache
def handler() -> LookupHandler:
    """The lookup handler over those tables, with small limits, and nothing in front of it."""
    loaded = {(table.name, table.version): table for table in tables().values()}
    labels = {(name, "latest"): table for name, table in tables().items()}
    snapshot = Snapshot(tables(), labels, loaded, {"1": tables()}, dict.fromkeys(loaded, "1"))
    lookups = Metrics().lookups
    for name in tables():
        lookups.add_table(name)
    service = LookupService(inline_ids=1 << 20, num_threads=1)
    here: Any = SimpleNamespace(snapshot=snapshot, started=True)
    health: Any = SimpleNamespace(answer=lambda _: (200, b"{}"), draining=False)
    return LookupHandler(here, service, lookups, health, KEYS, Buffers(), LIMITS, Regions(KEYS, 0))


def request_of(route: Route, body: bytes, headers: dict[bytes, bytes] | None = None) -> Request:
    """A POST."""
    return Request(b"POST", route, headers or {}, body, b"id", 0.0)


def octets(data: bytes) -> None:
    """Ids decoded from octets are those octets; a table of strings takes none."""
    (query,) = octet_stream.decode(request_of(Route(LOOKUP, "sparse"), data), LIMITS).queries
    ids: Any = query.ids_for(tables()["sparse"])
    assert ids.tobytes() == data
    vectors, found = tables()["sparse"].lookup(ids, return_found=True)
    assert vectors.shape == (len(ids), DIM)
    assert not vectors[~found].any()
    refused_or(query.ids_for, tables()["named"])


def one_body(data: bytes) -> None:
    """A JSON lookup that is understood has the ids it says, or is refused by a table of the other type."""
    (query,) = json_body.decode_one(request_of(Route(LOOKUP, "dense"), data), LIMITS).queries
    again = json.dumps({"ids": query.ids, "on_missing": query.on_missing, "dtype": query.dtype}).encode()
    (same,) = json_body.decode_one(request_of(Route(LOOKUP, "dense"), again), LIMITS).queries
    assert (same.ids, same.on_missing, same.dtype) == (query.ids, query.on_missing, query.dtype)
    for table in tables().values():
        refused_or(query.ids_for, table)


def many_body(data: bytes) -> None:
    """A JSON lookup of many tables names at least one."""
    assert json_body.decode_many(request_of(Route(LOOKUP_MANY), data), LIMITS).queries


def infer_body(data: bytes) -> None:
    """Tensors have the elements they say; the first two bytes are the length of the JSON, 0xffff for none given."""
    length = int.from_bytes(data[:2], "big")
    headers = {} if length == 0xFFFF else {b"inference-header-content-length": b"%d" % length}
    regions = Regions(KEYS, 0)
    decoded = tensors.decode_infer(headers, data[2:], MAX_IDS, Access(regions, headers, MAX_IDS).read)
    for name, tensor in decoded.inputs.items():
        assert len(tensor.values) <= MAX_IDS
        for read in (open_inference.int64s, open_inference.floats):
            refused_or(read, name, tensor)
    for model in ("dense", "named", routing.MANY):
        refused_or(open_inference.decode, request_of(Route(INFER, model), data[2:], headers), LIMITS, regions)


def url(data: bytes) -> None:
    """A request target has a route or none; a route is answered, by any method."""
    route = routing.parse(data)
    if route is not None:
        assert routing.parse(data) == route
        for method in (b"GET", b"POST"):
            _answer(Request(method, route, {b"content-type": b"application/octet-stream"}, bytes(8), b"id", 0.0))


def deadline(data: bytes) -> None:
    """A deadline is in the future, or there is none."""
    assert deadline_of({b"x-request-timeout-ms": data}, 5.0) >= 5.0


def request_id(data: bytes) -> None:
    """An id that goes into a header line is one word of printable ASCII."""
    assert re.fullmatch(rb"[\x21-\x7e]{1,128}", handler().request_id({b"x-request-id": data}))


TARGETS_OF_CALLS = (
    b"/v1/tables/dense/lookup",
    b"/v1/tables/sparse/lookup?on_missing=hash&dtype=int8",
    b"/v1/tables/named/versions/1/lookup",
    b"/v1/tables/dense/labels/latest/lookup?dtype=bfloat16&on_missing=default",
    b"/v1/lookup",
    b"/v1/releases/1/lookup",
    b"/v2/models/dense/infer",
    b"/v2/models/named/versions/1/infer",
    b"/v2/models/embstore/infer",
    b"/v1/tables/%s/lookup",
)
TYPES = (b"application/octet-stream", b"application/json", b"application/json; charset=utf-8", b"text/plain", b"")


def call(data: bytes) -> None:
    """A whole call: the first bytes choose target, types and the length of its JSON, the rest is the body."""
    chosen, body = data[:5].ljust(5, b"\0"), data[5:]
    target = TARGETS_OF_CALLS[chosen[0] % len(TARGETS_OF_CALLS)]
    if b"%s" in target:
        target %= b"".join(b"%%%02x" % byte for byte in chosen)
    route = routing.parse(target)
    if route is None:  # a slash in a table's name: FastAPI says that there is no such call
        return
    headers = {b"content-type": TYPES[chosen[1] % len(TYPES)], b"accept": TYPES[chosen[2] % len(TYPES)]}
    if chosen[3]:
        headers[b"inference-header-content-length"] = b"%d" % (chosen[3] * 256 + chosen[4])
    _answer(Request(b"POST", route, headers, body, b"id-1", 0.0))


@cache
def app() -> Any:
    """The handler behind the protocol of connections; what is not a lookup gets no answer."""

    class Served:
        outbox = Outbox()
        admission = Admission(
            handler().lookups, outbox, max_queued_requests=64, max_concurrency=64, max_waiting_bytes=1 << 22
        )
        limits = replace(LIMITS, max_connections=1 << 20, request_seconds=60, keepalive_seconds=60)
        services = Services(handler(), admission, outbox, handler().buffers, handler().lookups, limits)

        async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    return Served()


HEAD_LINES = (
    b"",
    b"X-Timing: 1\r\n",
    b"X-Request-ID: a\r\n",
    b"Connection: close\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"A:\tb\r\n",
    b" folded\r\n",
    b"\n",
)


def known_head(data: bytes) -> None:
    """A request whose head was seen before, and what follows it, give the bytes that parsing gives.

    The first bytes choose target, type, a line of the head and where it is cut; the rest is the body.
    """
    chosen, body = data[:5].ljust(5, b"\0"), data[5:]
    target = TARGETS_OF_CALLS[chosen[0] % (len(TARGETS_OF_CALLS) - 1)]
    line, kind = HEAD_LINES[chosen[1] % len(HEAD_LINES)], TYPES[chosen[2] % len(TYPES)]
    length = len(body) - chosen[3] % 3  # sometimes the body goes on after its length: the next request begins there
    head = b"POST %s HTTP/1.1\r\nContent-Type: %s\r\n%sContent-Length: %d\r\n\r\n" % (target, kind, line, length)
    request, cut = head + body, 1 + chosen[4] % (len(head) - 1)

    async def run() -> tuple[list[bytes], bytes]:
        served = app()
        served.services.plans.clear()
        known = [await Wire(served).send(request) for _ in range(3)]
        return known, await Wire(served).send(request[:cut], request[cut:])

    known, parsed = asyncio.run(run())
    assert {without_times(reply) for reply in known} == {without_times(parsed)}


def _answer(request: Request) -> None:
    """Answer a request, and look at the reply: no failure of ours, no line in its head that nobody meant."""
    reply = handler().answer(request)
    assert type(reply) is Reply
    assert reply.status in {200, *(kind.status for kind in KINDS.values())} - {500}, reply
    assert _HEAD.fullmatch(reply.head), reply.head
    body = b"".join(map(bytes, reply.body))
    if b"application/octet-stream" not in reply.head:
        orjson.loads(body)
    handler().buffers.give_back(reply.leases)


def refused_or(read: Callable[..., Any], *arguments: Any) -> None:
    """Call something that may refuse its arguments."""
    status = 200
    try:
        read(*arguments)
    except EmbstoreError as error:
        status = KINDS[error.code].status
    assert status < 500


TARGETS: tuple[Callable[[bytes], None], ...] = (
    octets,
    one_body,
    many_body,
    infer_body,
    url,
    deadline,
    request_id,
    call,
    known_head,
)


def one_input(data: bytes) -> None:
    """One fuzzed input: the first byte chooses the target. Raises whatever is not a refusal of ours."""
    if data:
        refused_or(TARGETS[data[0] % len(TARGETS)], data[1:])
