"""What a connection does with bytes that are no plain requests; no network, reads are cut where a test wants it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.wire import Wire

import embstore
from server.api.lookup import LookupHandler
from server.app import create_app
from server.http.asgi import App
from server.http.protocol import MAX_PIPELINED
from server.settings import Settings

VECTORS = np.arange(80_000, dtype=np.float32).reshape(20_000, 4)


def started(folder: Path, **options: Any) -> App:
    """An app that serves a table `item`."""
    store = embstore.open_store(folder / "store")
    store.publish("item", VECTORS)
    app = create_app(Settings(store=folder / "store", poll_seconds=60, cache="off", **options))
    handler = app.services.handler
    assert isinstance(handler, LookupHandler)
    handler.tables.start()
    end = time.monotonic() + 60
    while not (handler.tables.started and handler.tables.snapshot.latest):
        assert time.monotonic() < end
        time.sleep(0.02)
    return app


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> App:
    """One app for all tests that change nothing."""
    return started(tmp_path_factory.mktemp("protocol"))


def lookup(ids: list[int], *lines: bytes, length: int | None = None) -> bytes:
    """A lookup by octet stream."""
    body = np.array(ids, "<i8").tobytes()
    head = [b"POST /v1/tables/item/lookup HTTP/1.1", b"Host: x", b"Content-Type: application/octet-stream", *lines]
    size = len(body) if length is None else length
    return b"\r\n".join([*head, b"Content-Length: %d" % size, b"", body])


@pytest.mark.parametrize("target", [b"/v1/tables/item/lookup", b"/v1/tables"])
def test_what_follows_an_upgrade_is_never_a_request(app: App, target: bytes) -> None:
    """The body of a request that offers an Upgrade is not answered as the next request, and the connection ends."""
    smuggled = lookup([1])
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n"

    async def run() -> bytes:
        wire = Wire(app)
        first = await wire.send(head % (target, len(smuggled)))
        for _ in range(200):
            await asyncio.sleep(0.005)
            if wire.is_closed:
                break
        return first + await wire.send(smuggled)

    replies = asyncio.run(run())
    assert VECTORS[1].tobytes() not in replies
    assert replies.count(b"HTTP/1.1 ") <= 1


def test_a_refused_connection_gives_back_what_it_reserved(app: App) -> None:
    """After too many pipelined requests, the length that the next head announces is not held for good."""

    async def run() -> None:
        small = lookup([1]) * (MAX_PIPELINED + 2)
        wire = Wire(app)
        await wire.send(small + lookup([], length=4_000_000))
        wire.protocol.connection_lost(None)

    asyncio.run(run())
    assert app.services.admission.arriving_bytes == 0


def test_known_heads_that_wait_for_a_thread_hold_no_reservation(tmp_path: Path) -> None:
    """Large lookups at once, with heads seen before, are refused no sooner than those that are parsed."""
    app = started(tmp_path, inline_ids=16, max_waiting_bytes=1 << 20)
    request = lookup(list(range(12_000)))

    async def run() -> list[bytes]:
        await Wire(app).send(request)
        return [reply[:12] for reply in await asyncio.gather(*(Wire(app).send(request) for _ in range(14)))]

    assert asyncio.run(run()) == [b"HTTP/1.1 200"] * 14
    assert app.services.admission.arriving_bytes == 0
