"""A running server through its life: new versions without a lost request, bad versions kept out, a clean end."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from embstore_client import EmbeddingClient, EmbstoreError
from support.serving import ServerProcess, serving

import embstore
from embstore.publish.store import Store
from server.api.lookup import LookupHandler
from server.app import create_app
from server.settings import Settings

NUM, DIM = 200, 8


def constant(value: float) -> np.ndarray:
    """A table in which every number is `value`: a vector tells its version."""
    return np.full((NUM, DIM), value, np.float32)


def both(value: float) -> dict[str, embstore.Publication]:
    """Two tables that belong together."""
    return {name: embstore.Publication(constant(value)) for name in ("user", "item")}


class Load:
    """Threads that look up all the time and keep what went wrong."""

    def __init__(self, server: ServerProcess, threads: int = 3) -> None:
        self.server, self.failures, self.seen, self.releases = server, [], set(), set()
        self.lookups = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(many,)) for many in [True] + [False] * (threads - 1)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, many: bool) -> None:
        with EmbeddingClient(self.server.url, timeout_s=30) as client:
            while not self._stop.is_set():
                try:
                    self._many(client) if many else self._one(client)
                    self.lookups += 1
                except (EmbstoreError, AssertionError) as error:
                    self.failures.append(repr(error))

    def _one(self, client: EmbeddingClient) -> None:
        rows = client.lookup("item", [0, 5, NUM - 1])
        assert (rows.vectors == rows.version).all(), (rows.version, rows.vectors[:, 0])
        self.seen.add(rows.version)

    def _many(self, client: EmbeddingClient) -> None:
        rows = client.lookup_many({"user": [1], "item": [2]})
        values = rows["user"].vectors[0, 0], rows["item"].vectors[0, 0]
        assert rows.release is not None, "two releases mixed"
        assert values[0] == values[1] == float(rows.release), (rows.release, values)
        self.releases.add(rows.release)


def test_new_releases_go_live_without_a_failed_or_mixed_request(tmp_path: Path) -> None:
    """Ten releases under load: each is served, every reply is whole and from one release, nothing fails."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    with serving(tmp_path / "store", tmp_path / "log") as server, Load(server) as load:
        server.wait_until(lambda: "1" in load.releases, "release 1")
        for value in range(2, 12):
            release = store.publish_release(both(value))
            server.wait_until(lambda r=release.id: r in load.releases, f"release {release.id}")
        assert server.process.poll() is None
    assert load.failures == []
    assert load.lookups > 100
    assert load.releases == {str(n) for n in range(1, 12)}


def corrupt_bytes(version: Path) -> None:
    """One bit of the arrays flips."""
    path = version / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def corrupt_golden(version: Path) -> None:
    """The golden ids are said to have other vectors."""
    path = version / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["golden"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))


def corrupt_nan(version: Path) -> None:
    """NaN in the arrays, with digests that fit: only looking at the numbers finds it."""
    import hashlib

    path = version / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[-4 * DIM : -4 * DIM + 4] = np.float32("nan").tobytes()
    path.write_bytes(data)
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (version / "manifest.json").write_text(json.dumps(manifest))


def corrupt_manifest(version: Path) -> None:
    """The manifest is cut off."""
    path = version / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])


CORRUPTIONS = [corrupt_bytes, corrupt_golden, corrupt_nan, corrupt_manifest]


def publish_corrupted(store: Store, value: float, corrupt: Callable[[Path], None]) -> str:
    """A release whose item version is damaged before it can be seen: made in a copy of the store, moved over whole."""
    with TemporaryDirectory(dir=store.root.parent) as scratch:
        copy = Store(shutil.copytree(store.root, Path(scratch) / "store"))
        release = copy.publish_release(both(value))
        corrupt(copy.root / "tables/item/versions" / str(release.tables["item"]))
        moved = [f"tables/{name}/versions/{version}" for name, version in release.tables.items()]
        moved += [f"releases/{release.id}.json", *(f"tables/{name}/labels/latest.json" for name in release.tables)]
        for path in moved:
            (copy.root / path).rename(store.root / path)
    return release.id


def test_a_bad_version_never_reaches_traffic(tmp_path: Path) -> None:
    """Whatever is damaged, the old release is served on, the reason is shown, and the next good one goes live."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    with serving(tmp_path / "store", tmp_path / "log") as server, Load(server) as load:
        server.wait_until(lambda: "1" in load.releases, "release 1")
        for number, corrupt in enumerate(CORRUPTIONS, start=2):
            publish_corrupted(store, number, corrupt)

            def refused(version: int = number) -> bool:
                versions = httpx.get(f"{server.url}/v1/tables/item/versions").json()["versions"]
                return any(v["version"] == version and v["state"] == "failed" and v["reason"] for v in versions)

            server.wait_until(refused, f"{corrupt.__name__} to be refused")
        assert load.releases == {"1"}
        good = store.publish_release(both(6))
        server.wait_until(lambda: good.id in load.releases, "the next good release")
    assert load.failures == []
    assert load.releases == {"1", good.id}
    text = (tmp_path / "log").read_text()
    assert text.count("version refused") == len(CORRUPTIONS)


def test_a_restarted_server_falls_back_to_the_last_good_version(tmp_path: Path) -> None:
    """With a damaged latest version a fresh server serves the one before it, and says so."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    publish_corrupted(store, 2, corrupt_bytes)
    with serving(tmp_path / "store", tmp_path / "log") as server:
        with EmbeddingClient(server.url, timeout_s=30) as client:
            assert client.lookup("item", [1]).vectors[0, 0] == 1
        assert any(event["event"] == "serving an older version" for event in server.events())


def test_a_fallback_is_only_what_was_served_before(tmp_path: Path) -> None:
    """With several damaged versions a fresh server goes back to the last promoted release, not to a staged version."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    store.publish("item", constant(2), label=None)
    for value in (3, 4, 5):
        publish_corrupted(store, value, corrupt_bytes)
    with serving(tmp_path / "store", tmp_path / "log") as server, EmbeddingClient(server.url, timeout_s=30) as client:
        rows = client.lookup_many({"user": [1], "item": [1]})
        assert (rows.release, rows["user"].version, rows["item"].version) == ("1", 1, 1)


def test_one_damaged_small_file_takes_nothing_down(tmp_path: Path) -> None:
    """A damaged label and a damaged release are reported; every other table and release is served and followed."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    store.publish("item", constant(2), label="canary")
    (tmp_path / "store/tables/item/labels/canary.json").write_text("")
    store.publish_release(both(3))
    (tmp_path / "store/releases/1.json").write_text("{")
    with serving(tmp_path / "store", tmp_path / "log") as server, EmbeddingClient(server.url, timeout_s=30) as client:
        assert client.lookup("item", [1]).version == 3
        store.publish_release(both(4))
        server.wait_until(lambda: client.lookup("user", [1]).vectors[0, 0] == 4, "the next release")
        assert [e["event"] for e in server.events()].count("damaged file in the store") == 2


def test_a_store_that_vanishes_is_served_on(tmp_path: Path) -> None:
    """An unmounted store changes nothing for what is loaded; when it is back it is followed again."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("item", constant(1))
    with serving(tmp_path / "store", tmp_path / "log") as server, EmbeddingClient(server.url, timeout_s=30) as client:
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        server.wait_until(lambda: any("store cannot be read" in e["event"] for e in server.events()), "the log")
        assert client.lookup("item", [1]).version == 1
        assert client.ready()
        (tmp_path / "elsewhere").rename(tmp_path / "store")
        store.publish("item", constant(2))
        server.wait_until(lambda: client.lookup("item", [1]).version == 2, "version 2")


def test_a_table_without_a_good_version_is_unavailable_not_unknown(tmp_path: Path) -> None:
    """Its lookups get 503 and say why; other tables are served and the server is ready."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("item", constant(1))
    store.publish("user", constant(1))
    corrupt_bytes(tmp_path / "store/tables/user/versions/1")
    with serving(tmp_path / "store", tmp_path / "log") as server:
        reply = httpx.post(f"{server.url}/v1/tables/user/lookup", json={"ids": [1]})
        assert (reply.status_code, reply.json()["code"], reply.json()["table"]) == (503, "not_ready", "user")
        assert httpx.get(f"{server.url}/readyz").json()["unserved"] == ["user"]
        assert httpx.post(f"{server.url}/v1/tables/item/lookup", json={"ids": [1]}).status_code == 200


def test_a_stalled_body_does_not_hold_the_shutdown(tmp_path: Path) -> None:
    """A client that sends half a body is told 503 when the time for requests in flight is over; exit code 0."""
    embstore.open_store(tmp_path / "store").publish("item", constant(1))
    patience = {"EMBSTORE_SHUTDOWN_SECONDS": "1"}
    with serving(tmp_path / "store", tmp_path / "log", env=patience) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/tables/item/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 80\r\n"
                b"Content-Type: application/octet-stream\r\n\r\n" + bytes(40)
            )
            httpx.get(f"{server.url}/livez")
            assert server.stop() == 0
            reply = connection.recv(1 << 16)
        assert reply.startswith(b"HTTP/1.1 503")
        assert b'"code":"draining"' in reply
        assert "Traceback" not in server.log_path.read_text()


def test_labels_half_moved_keep_the_old_release(tmp_path: Path) -> None:
    """A publisher that died between two labels leaves no mixture: all tables stay on the release before."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(both(1))
    release = store.publish_release(both(2), label=None)
    store.set_label("user", "latest", 2, release=release.id)
    with serving(tmp_path / "store", tmp_path / "log") as server, EmbeddingClient(server.url, timeout_s=30) as client:
        half = client.lookup_many({"user": [1], "item": [1]})
        assert (half.release, half["user"].vectors[0, 0], half["item"].vectors[0, 0]) == ("1", 1, 1)
        assert client.lookup("user", [1]).version == 1
        store.set_label("item", "latest", 2, release=release.id)
        server.wait_until(lambda: client.lookup("item", [1]).version == 2, "the release to be whole")
        assert client.lookup_many({"user": [1], "item": [1]}).release == "2"


def test_labels_and_rollback_are_followed(tmp_path: Path) -> None:
    """Other labels serve beside the latest, and moving the latest back is served as quickly as forward."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("item", constant(1))
    store.publish("item", constant(2), label="canary")
    with (
        serving(tmp_path / "store", tmp_path / "log") as server,
        EmbeddingClient(server.url, timeout_s=30) as client,
    ):
        assert client.lookup("item", [1]).version == 1
        assert client.lookup("item", [1], label="canary").version == 2
        store.set_label("item", "latest", 2)
        server.wait_until(lambda: client.lookup("item", [1]).version == 2, "the promotion")
        store.set_label("item", "latest", 1)
        server.wait_until(lambda: client.lookup("item", [1]).version == 1, "the rollback")


def test_an_empty_store_is_not_ready_until_something_is_published(tmp_path: Path) -> None:
    """The server starts without a store, says why it is not ready, and becomes ready by itself."""
    with serving(tmp_path / "store", tmp_path / "log", ready=False) as server:
        server.wait_until(lambda: httpx.get(f"{server.url}/startupz").status_code == 200, "the first look")
        reply = httpx.get(f"{server.url}/readyz")
        assert reply.status_code == 503
        assert "latest" in reply.json()["reasons"][0]
        assert httpx.get(f"{server.url}/livez").status_code == 200
        embstore.open_store(tmp_path / "store").publish("item", constant(3))
        server.wait_ready()
        assert server.stop() == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_zero(tmp_path: Path, sig: signal.Signals) -> None:
    """Under load a signal turns readiness off, answers everything it accepted, and ends with status 0."""
    embstore.open_store(tmp_path / "store").publish_release(both(1))
    with serving(tmp_path / "store", tmp_path / "log", drain_seconds=1.0) as server:
        statuses: list[object] = []

        def ask() -> None:
            """A new connection each time, as a balancer that has not looked yet would; until nobody listens."""
            while True:
                try:
                    statuses.append(httpx.post(f"{server.url}/v1/tables/item/lookup", json={"ids": [1]}).status_code)
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    statuses.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        server.wait_until(lambda: len(statuses) > 20, "some load")
        before = len(statuses)
        server.process.send_signal(sig)
        if sig == signal.SIGTERM:
            reply = httpx.get(f"{server.url}/readyz")
            assert (reply.status_code, reply.json()["reasons"]) == (503, ["shutting down"])
            assert httpx.get(f"{server.url}/livez").status_code == 200
            closing = httpx.post(f"{server.url}/v1/tables/item/lookup", json={"ids": [1]})
            assert (closing.status_code, closing.headers["connection"]) == (200, "close")
        assert server.process.wait(20) == 0
        for thread in threads:
            thread.join(20)
        if sig == signal.SIGTERM:
            assert len(statuses) > before
        assert set(statuses) == {200}  # SIGINT waits for nobody who connects at the last moment, SIGTERM does
    assert "stopped" in [event["event"] for event in server.events()]


@pytest.mark.parametrize("cache", ["off", "on"])
def test_a_version_that_was_replaced_leaves_memory_at_once(tmp_path: Path, cache: Literal["off", "on"]) -> None:
    """Nothing goes in circles around a table: freeing it needs no collector, which stops requests while it looks."""
    store = embstore.open_store(tmp_path / "store")
    store.publish("item", np.zeros((5000, 8), np.float32))
    settings = Settings(store=tmp_path / "store", poll_seconds=0.05, keep_versions=1, cache=cache)
    handler = create_app(settings).services.handler
    assert isinstance(handler, LookupHandler)
    tables = handler.tables
    collects = gc.isenabled()
    gc.disable()
    tables.start()
    try:
        wait_for(lambda: "item" in tables.snapshot.latest)
        replaced = weakref.ref(tables.snapshot.latest["item"])
        version = store.publish("item", np.ones((5000, 8), np.float32))
        wait_for(lambda: tables.snapshot.latest["item"].version == version)
        wait_for(lambda: replaced() is None)
    finally:
        tables.stop()
        gc.unfreeze()
        if collects:
            gc.enable()


def wait_for(ready: Callable[[], bool]) -> None:
    """Until it is so."""
    end = time.monotonic() + 30
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.02)
