"""A request whose head was seen before is answered as one that is parsed: the same bytes, the same counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.wire import Wire, without_times

import embstore
from server.api.lookup import LookupHandler
from server.app import create_app
from server.http.asgi import App
from server.http.plans import MAX_HEADS
from server.settings import Settings

VECTORS = np.arange(40, dtype=np.float32).reshape(10, 4)
NAMES = [f"sku-{row}" for row in range(10)]
KEY = b"a-key-of-this-test"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> embstore.Store:
    """A table of each kind of ids, published together."""
    store = embstore.open_store(tmp_path_factory.mktemp("planned") / "store")
    ids: dict[str, Any] = {"dense": None, "sparse": [row * 1_000_003 - 7 for row in range(10)], "named": NAMES}
    store.publish_release({name: embstore.Publication(VECTORS, ids=of) for name, of in ids.items()})
    return store


def started(store: embstore.Store, **options: Any) -> App:
    """An app that serves a store."""
    app = create_app(Settings(store=Path(store.root), poll_seconds=0.05, cache="off", **options))
    tables = handler_of(app).tables
    tables.start()
    end = time.monotonic() + 60
    while not (tables.started and tables.snapshot.latest):
        assert time.monotonic() < end
        time.sleep(0.02)
    return app


def handler_of(app: App) -> LookupHandler:
    """What answers its lookups."""
    handler = app.services.handler
    assert isinstance(handler, LookupHandler)
    return handler


@pytest.fixture(scope="module")
def app(store: embstore.Store) -> Iterator[App]:
    """One app for all requests."""
    app = started(store)
    yield app
    handler_of(app).tables.stop()


def octets(ids: list[int], *lines: bytes, target: bytes = b"/v1/tables/dense/lookup", version: bytes = b"1.1") -> bytes:
    """A lookup by octet stream."""
    return request(target, b"application/octet-stream", np.array(ids, "<i8").tobytes(), *lines, version=version)


def request(target: bytes, content_type: bytes, body: bytes, *lines: bytes, version: bytes = b"1.1") -> bytes:
    """A POST with a Content-Length."""
    head = [b"POST %s HTTP/%s" % (target, version), b"Host: x", b"Content-Type: " + content_type, *lines]
    return b"\r\n".join([*head, b"Content-Length: %d" % len(body), b"", body])


def head_of(request: bytes) -> bytes:
    """A request without its body."""
    return request[: request.index(b"\r\n\r\n") + 4]


def both_ways(app: App, request: bytes) -> tuple[bytes, bytes]:
    """The reply to a request that comes for the third time, and to the same one cut where it has to be parsed."""

    async def run() -> tuple[bytes, bytes]:
        app.services.plans.clear()
        wire = Wire(app)
        for _ in range(2):
            await wire.send(request)
            wire = Wire(app) if wire.is_closed else wire
        known = await wire.send(request)
        return known, await Wire(app).send(request[:5], request[5:])

    known, parsed = asyncio.run(run())
    return without_times(known), without_times(parsed)


TARGETS = [
    b"/v1/tables/dense/lookup",
    b"/v1/tables/sparse/lookup",
    b"/v1/tables/named/lookup",
    b"/v1/tables/dense/versions/1/lookup",
    b"/v1/tables/dense/versions/9/lookup",
    b"/v1/tables/dense/labels/latest/lookup",
    b"/v1/tables/nobody/lookup",
    b"/v1/lookup",
    b"/v1/releases/1/lookup",
    b"/v2/models/dense/infer",
    b"/v2/models/embstore/infer",
    b"/v2/models/dense/versions/1/infer",
]
QUERIES = [
    b"",
    b"?on_missing=error",
    b"?on_missing=default&dtype=float16",
    b"?dtype=int8",
    b"?on_missing=hash",
    b"?x=1",
]
LINES = [
    b"Accept: */*",
    b"Accept: application/octet-stream",
    b"Connection: keep-alive",
    b"Connection: close",
    b"X-Request-ID: mine",
    b"X-Request-ID: \xe4",
    b"X-Request-Timeout-Ms: 60000",
    b"X-Request-Timeout-Ms: soon",
    b"X-Timing: 1",
    b"Expect: 100-continue",
    b"Content-Encoding: gzip",
    b"Traceparent: 00-1-2-00",
    b"Inference-Header-Content-Length: 0",
]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Requests of every protocol, right and wrong."""
    target = draw(st.sampled_from(TARGETS)) + draw(st.sampled_from(QUERIES))
    ids = draw(st.lists(st.integers(-2, 12) | st.just(1_000_003 - 7), max_size=40))
    lines = draw(st.lists(st.sampled_from(LINES), unique=True, max_size=4))
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.0"]))
    kind = draw(st.sampled_from(["octets", "json", "many", "infer", "bytes"]))
    if kind == "octets":
        return octets(ids, *lines, target=target, version=version)
    bodies: dict[str, Any] = {
        "json": {"ids": ids},
        "many": {"tables": {"dense": {"ids": ids}, "sparse": {"ids": ids}}},
        "infer": {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [len(ids)], "data": ids}]},
    }
    body = draw(st.binary(max_size=40)) if kind == "bytes" else json.dumps(bodies[kind]).encode()
    return request(target, b"application/json", body, *lines, version=version)


@settings(max_examples=300)
@example(octets([1, 2, 3]))
@example(octets([1, 99]))
@example(octets([], b"X-Timing: 1"))
@given(requests())
def test_a_known_head_gives_the_bytes_that_parsing_gives(app: App, request: bytes) -> None:
    """Whatever is asked, the reply to a head seen before equals the reply to one that was parsed."""
    known, parsed = both_ways(app, request)
    assert known == parsed
    assert known or b"Expect" in request


def test_usual_requests_are_planned_and_unusual_ones_are_not(app: App) -> None:
    """Heads are kept of requests that were answered with vectors, came whole, and ask for nothing unusual."""
    usual = (
        octets([1, 2]),
        octets([1], b"Connection: keep-alive"),
        request(TARGETS[0], b"application/json", b'{"ids":[1]}'),
    )
    unusual = (
        octets([1], b"Connection: close"),
        octets([1], b"Expect: 100-continue"),
        octets([1], version=b"1.0"),
        octets([1], target=b"/v1/tables/nobody/lookup"),
        octets([1]).replace(b"Host: x\r\n", b"Host: x\n"),
    )
    for planned, sent in [*((True, one) for one in usual), *((False, one) for one in unusual)]:
        both_ways(app, sent)
        assert (app.services.plans.find(head_of(sent)) is not None) == planned, sent


def test_a_lookup_counts_the_same_either_way(app: App) -> None:
    """Lookups, ids and their sizes are counted alike, whether a head was parsed or known."""

    async def counts(cut: int) -> list[float]:
        wire, numbers = Wire(app), handler_of(app).lookups._tables["dense", "octet-stream"][1]
        await wire.send(octets([1, 2, 3]))
        before = numbers[0]
        sent = octets([1, 2, 3])
        await wire.send(*(part for part in (sent[:cut], sent[cut:]) if part))
        return [numbers[0] - before]

    assert asyncio.run(counts(0)) == asyncio.run(counts(5)) == [3.0]


def test_requests_in_one_read_and_bodies_in_two_keep_their_order(app: App) -> None:
    """Known heads that come together, or without their body, are answered in the order of the requests."""

    async def run() -> tuple[bytes, bytes]:
        wire = Wire(app)
        first, second = octets([1]), octets([2])
        await wire.send(first)
        together = await wire.send(first + second, first)
        cut = len(head_of(first)) + 3
        return together, await wire.send(first[:cut], first[cut:] + second)

    for replies in asyncio.run(run()):
        rows = [reply.split(b"\r\n\r\n", 1)[1][:16] for reply in replies.split(b"HTTP/1.1 200 OK")[1:]]
        expected = [VECTORS[[1]].tobytes(), VECTORS[[2]].tobytes()]
        assert rows[:2] == expected


def test_a_known_head_is_answered_by_the_version_served_now(tmp_path: Path) -> None:
    """A publish reaches requests whose heads were planned before it."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("dense", VECTORS)
    app = started(store)

    async def run() -> tuple[bytes, bytes]:
        wire = Wire(app)
        before = [await wire.send(octets([3])) for _ in range(3)][-1]
        version = store.publish("dense", VECTORS + 1)
        while handler_of(app).tables.snapshot.latest["dense"].version != version:
            await asyncio.sleep(0.02)
        return before, await wire.send(octets([3]))

    before, after = asyncio.run(run())
    handler_of(app).tables.stop()
    assert before.endswith(VECTORS[[3]].tobytes())
    assert after.endswith((VECTORS[[3]] + 1).tobytes())
    assert b"x-embedding-version: 2" in after


def test_a_known_head_is_answered_in_the_width_served_now(tmp_path: Path) -> None:
    """A version with longer vectors, whose replies are too large for the memory of small ones, is answered whole."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("dense", VECTORS)
    app = started(store)
    wide = np.arange(20_000, dtype=np.float32).reshape(10, 2_000)

    async def run() -> bytes:
        wire = Wire(app)
        for _ in range(2):
            await wire.send(octets([3, 1, 2, 0, 4]))
        version = store.publish("dense", wide)
        while handler_of(app).tables.snapshot.latest["dense"].version != version:
            await asyncio.sleep(0.02)
        return await wire.send(octets([3, 1, 2, 0, 4]))

    reply = asyncio.run(run())
    handler_of(app).tables.stop()
    assert reply.endswith(b"\r\n\r\n" + wide[[3, 1, 2, 0, 4]].tobytes())


def test_a_draining_server_closes_connections_of_known_heads(store: embstore.Store) -> None:
    """While a server drains, a request with a known head is answered and its connection closed."""
    app = started(store)

    async def run() -> bytes:
        wire = Wire(app)
        await wire.send(octets([3]))
        app.services.drain()
        return await wire.send(octets([3]))

    reply = asyncio.run(run())
    handler_of(app).tables.stop()
    assert b"connection: close\r\n" in reply
    assert reply.endswith(VECTORS[[3]].tobytes())


def test_a_key_is_part_of_the_head(store: embstore.Store, tmp_path: Path) -> None:
    """A head with an API key opens nothing for one without it, or with another key."""
    (tmp_path / "keys").write_bytes(KEY)
    app = started(store, api_keys_file=tmp_path / "keys")

    async def run() -> list[bytes]:
        wire = Wire(app)
        sent = [octets([3], b"X-API-Key: " + key) for key in (KEY, KEY, b"another-key-of-it")]
        return [(await wire.send(one))[:12] for one in [*sent, octets([3])]]

    statuses = asyncio.run(run())
    handler_of(app).tables.stop()
    assert statuses == [b"HTTP/1.1 200", b"HTTP/1.1 200", b"HTTP/1.1 401", b"HTTP/1.1 401"]


def test_heads_that_never_come_again_are_forgotten(app: App) -> None:
    """A caller whose every head is new makes the map no larger than two generations, and a head in use stays."""

    async def run() -> None:
        app.services.plans.clear()
        wire, used = Wire(app), octets([3])
        for number in range(5 * MAX_HEADS):
            await wire.send(octets([1], b"Traceparent: %d" % number))
            if number % 100 == 0:
                await wire.send(used)
        assert len(app.services.plans) <= 2 * MAX_HEADS
        assert app.services.plans.find(head_of(used)) is not None

    asyncio.run(run())
