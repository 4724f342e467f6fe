"""Calls that change what is served: labels move to versions that are ready, tables leave and come back, keys decide."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.serving import ServerProcess, serving

import embstore
from embstore.errors import NotReady, StoreError, TableNotFound, VerificationFailed
from embstore.publish.store import Store
from server.metrics.recorder import Metrics
from server.tables.registry import Registry
from server.tables.unloaded import UnloadedTables

NUM, DIM = 50, 4


def constant(value: float) -> np.ndarray:
    """A table in which every number is `value`: a vector tells its version."""
    return np.full((NUM, DIM), value, np.float32)


def damage(store: Store, table: str, version: int) -> None:
    """Change one byte of a version's arrays."""
    path = store.root / f"tables/{table}/versions/{version}/arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


# ---- labels over HTTP ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Versions 1 (latest), 2 (no label, loaded) and 3 (damaged) of one table."""
    folder = tmp_path_factory.mktemp("admin")
    store = embstore.open_store(folder / "store")
    store.publish("item", constant(1))
    for value in (2, 3):
        store.publish("item", constant(value), label=None)
    damage(store, "item", 3)
    with serving(folder / "store", folder / "log") as running:
        running.wait_until(lambda: states(running) == {1: "ready", 2: "ready", 3: "failed"}, "three versions")
        yield running


def states(server: ServerProcess) -> dict[int, str]:
    """What became of each version."""
    versions = httpx.get(f"{server.url}/v1/tables/item/versions").json()["versions"]
    return {one["version"]: one["state"] for one in versions}


def move(server: ServerProcess, label: str, body: Any, table: str = "item", **headers: str) -> httpx.Response:
    """Ask for a label to be moved."""
    content: Any = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.put(f"{server.url}/v1/tables/{table}/labels/{label}", headers=headers, timeout=30, **content)


def test_a_label_moves_to_a_version_that_is_ready(server: ServerProcess) -> None:
    """The reply says where the label is; the next lookup is answered from there, and so is the store's next reader."""
    for label, path in (("canary", "/labels/canary"), ("latest", "")):
        for version in (2, 1):
            reply = move(server, label, {"version": version})
            assert (reply.status_code, reply.json()) == (
                200,
                {"table": "item", "label": label, "version": version, "served": version},
            )
            looked_up = httpx.post(f"{server.url}/v1/tables/item{path}/lookup", json={"ids": [1]}).json()
            assert (looked_up["version"], looked_up["vectors"][0][0]) == (version, float(version))


@pytest.mark.parametrize(
    ("version", "text"),
    [(3, "is failed here: "), (9, "is not loaded here; ready are 1, 2"), (0, "is not loaded here")],
    ids=["damaged", "unknown", "zero"],
)
def test_a_label_does_not_move_to_a_version_that_is_not_ready(server: ServerProcess, version: int, text: str) -> None:
    """409, with the reason, and nothing has moved."""
    reply = move(server, "latest", {"version": version})
    assert (reply.status_code, reply.json()["code"], reply.json()["version"]) == (409, "conflict", version)
    assert text in reply.json()["detail"]
    assert httpx.post(f"{server.url}/v1/tables/item/lookup", json={"ids": [1]}).json()["version"] == 1


@pytest.mark.parametrize(
    ("label", "body", "table", "status", "text"),
    [
        ("7", {"version": 1}, "item", 422, "cannot be a number"),
        ("-x", {"version": 1}, "item", 422, "label name '-x'"),
        ("a", {"version": 1}, "nobody", 404, "no table named 'nobody'"),
        ("a", {"version": "1"}, "item", 400, "Expected `int`, got `str`"),
        ("a", {"version": 1, "force": True}, "item", 400, "unknown field `force`"),
        ("a", b"", "item", 400, "body: "),
        ("a", b" " * 70_000, "item", 413, "65,536 bytes"),
    ],
    ids=["number", "name", "table", "type", "field", "empty", "large"],
)
def test_what_is_wrong_with_a_move_is_said(
    server: ServerProcess, label: str, body: Any, table: str, status: int, text: str
) -> None:
    """Each mistake has its status and its words, as a problem body."""
    reply = move(server, label, body, table)
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
    assert text in reply.json()["detail"]


def test_admin_keys_open_admin_calls_and_nothing_else_does(tmp_path: Path) -> None:
    """With a file of admin keys, moving, loading and unloading need one; metadata and the index do not."""
    embstore.open_store(tmp_path / "store").publish("item", constant(1))
    (tmp_path / "admin").write_text("admin-key-1\n")
    with serving(tmp_path / "store", tmp_path / "log", admin_keys_file=tmp_path / "admin") as server:
        for headers in ({}, {"X-API-Key": "admin-key-2"}, {"Authorization": "Basic admin-key-1"}):
            assert move(server, "latest", {"version": 1}, **headers).status_code == 401
            for verb in ("load", "unload"):
                url = f"{server.url}/v2/repository/models/item/{verb}"
                reply = httpx.post(url, headers=headers)
                assert (reply.status_code, "admin API key required" in reply.json()["error"]) == (401, True)
        assert httpx.get(f"{server.url}/v2/models/item/ready").status_code == 200
        assert httpx.post(f"{server.url}/v2/repository/index").json()[0]["state"] == "READY"
        assert move(server, "latest", {"version": 1}, Authorization="Bearer admin-key-1").status_code == 200


def test_without_admin_keys_there_is_no_administration_beyond_loopback(tmp_path: Path) -> None:
    """A server on all addresses refuses changes when it has no admin keys."""
    embstore.open_store(tmp_path / "store").publish("item", constant(1))
    with serving(tmp_path / "store", tmp_path / "log", host="0.0.0.0") as server:
        reply = move(server, "latest", {"version": 1})
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
        assert httpx.post(f"{server.url}/v2/repository/models/item/unload").status_code == 403


def test_every_worker_unloads_and_loads(tmp_path: Path) -> None:
    """What one of several processes is told holds for all of them from their next look at the store on."""
    store = embstore.open_store(tmp_path / "store")
    for name in ("item", "user"):
        store.publish(name, constant(1))
    with serving(tmp_path / "store", tmp_path / "log", workers=2) as server:

        def answers(status: int) -> bool:
            """Whether twenty new connections, to whichever worker, get this status."""
            url = f"{server.url}/v2/models/item/ready"
            return all(httpx.get(url).status_code == status for _ in range(20))

        server.wait_until(lambda: answers(200), "all workers to serve")
        assert httpx.post(f"{server.url}/v2/repository/models/item/unload", timeout=30).status_code == 200
        server.wait_until(lambda: answers(404), "all workers to unload")
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert httpx.post(f"{server.url}/v2/repository/models/item/load", timeout=30).status_code == 200
        server.wait_until(lambda: answers(200), "all workers to load")


# ---- the registry itself -------------------------------------------------------------------------------------------


@contextmanager
def watching(store: Store, **options: Any) -> Iterator[Registry]:
    """A registry at work, stopped at the end."""
    registry = Registry(store, Metrics(), device="cpu", keep_versions=2, poll_seconds=0.05, **options)
    registry.start()
    try:
        wait(lambda: registry.started)
        yield registry
    finally:
        registry.stop()


def wait(done: Callable[[], bool]) -> None:
    """Poll until it is so."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_unloaded_table_stays_away_until_it_is_loaded(tmp_path: Path) -> None:
    """Not even a new version brings it back; its release goes on without it, and its memory is let go."""
    store = embstore.open_store(tmp_path)
    store.publish_release({name: embstore.Publication(constant(1)) for name in ("item", "user")})
    gone: list[str] = []
    with watching(store, forget=lambda table: gone.append(f"{table.name} {table.version}")) as registry:
        registry.unload("item")
        assert (set(registry.snapshot.latest), gone) == ({"user"}, ["item 1"])
        assert registry.snapshot.together(["user"], None)[0] == "1"
        with pytest.raises(TableNotFound, match="in release '1'"):
            registry.snapshot.together(["item"], "1")
        store.publish_release({name: embstore.Publication(constant(2)) for name in ("item", "user")})
        wait(lambda: registry.snapshot.latest["user"].version == 2)
        assert set(registry.snapshot.latest) == {"user"}
        registry.unload("item")  # once more: nothing to do
        registry.load("item")
        assert {name: table.version for name, table in registry.snapshot.latest.items()} == {"item": 2, "user": 2}
        assert registry.snapshot.together(["item", "user"], None)[0] == "2"
        registry.unload("item")
        registry.unload("user")
        assert not registry.snapshot.loaded


def test_loading_says_why_it_cannot(tmp_path: Path) -> None:
    """A table that is damaged, and one that does not exist, are told apart; mended, it is served."""
    store = embstore.open_store(tmp_path)
    store.publish("good", constant(1))
    store.publish("bad", constant(1))
    damage(store, "bad", 1)
    with watching(store) as registry:
        for _ in range(2):
            with pytest.raises(NotReady, match=r"table 'bad' is not served: version 1: .*SHA-256"):
                registry.load("bad")
        for call in (registry.load, registry.unload):
            with pytest.raises(TableNotFound):
                call("nobody")
        damage(store, "bad", 1)  # the same bit once more: as it was
        registry.load("bad")
        assert set(registry.snapshot.latest) == {"good", "bad"}


def test_a_store_that_cannot_be_read_is_the_reason(tmp_path: Path) -> None:
    """Loading does not call a table served when nobody could look."""
    store = embstore.open_store(tmp_path)
    store.publish("item", constant(1))
    with watching(store) as registry:

        def broken() -> Any:
            raise StoreError("reading the store failed: Input/output error")

        store.survey = broken  # type: ignore[method-assign]
        with pytest.raises(NotReady, match="Input/output error"):
            registry.load("item")
        assert set(registry.snapshot.latest) == {"item"}


def test_processes_that_share_a_folder_agree(tmp_path: Path) -> None:
    """What one unloads the other stops serving, one that starts later never serves, and all load it again."""
    store, control = embstore.open_store(tmp_path / "store"), tmp_path / "control"
    for name in ("item", "user"):
        store.publish(name, constant(1))
    with watching(store, control=control) as one, watching(store, control=control) as other:
        one.unload("item")
        wait(lambda: set(other.snapshot.latest) == {"user"})
        with watching(store, control=control) as late:
            assert set(late.snapshot.latest) == {"user"}
        other.load("item")
        assert set(other.snapshot.latest) == {"item", "user"}
        wait(lambda: set(one.snapshot.latest) == {"item", "user"})


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    """Threads of two processes' sets that add and take away names at the same time each have their effect."""
    sets = [UnloadedTables(tmp_path / "control"), UnloadedTables(tmp_path / "control")]

    def work(number: int) -> None:
        for name in ("a", "b", "c"):
            sets[number % 2].add(f"{name}{number}")
        sets[number % 2].discard(f"a{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sets[0].read() == sets[1].read() == {f"{name}{n}" for name in ("b", "c") for n in range(8)}


def test_a_damaged_control_file_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    """Nothing is served again because a file cannot be read."""
    unloaded = UnloadedTables(tmp_path)
    unloaded.add("item")
    (tmp_path / "unloaded.json").write_text("{")
    with pytest.raises(VerificationFailed, match="not valid JSON"):
        unloaded.read()
