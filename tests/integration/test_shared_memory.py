"""Shared memory over HTTP: who may use it, what may be registered, and that bad names and objects harm nobody."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.serving import ServerProcess, serving

import embstore
from server.api.shared_objects import FOLDER

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")
KEY = "a-lookup-key"
ITEMS = np.arange(40, dtype=np.float32).reshape(10, 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One table."""
    root = tmp_path_factory.mktemp("shared") / "store"
    embstore.open_store(root).publish("item", ITEMS)
    return root


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on loopback."""
    with serving(store, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object of 64 bytes."""
    path = FOLDER / f"embstore-test-{secrets.token_hex(6)}"
    path.write_bytes(bytes(64))
    yield path
    path.unlink(missing_ok=True)


def register(server: ServerProcess, key: str, name: str = "a", **more: Any) -> httpx.Response:
    """Ask for a region."""
    asked = {"key": key, "offset": 0, "byte_size": 64} | more.pop("json", {})
    return httpx.post(f"{server.url}/v2/systemsharedmemory/region/{name}/register", json=asked, **more)


def infer(server: ServerProcess, by: Any = httpx, **headers: str) -> httpx.Response:
    """A lookup of two ids that are in region `a`; by: the connection."""
    place = {"shared_memory_region": "a", "shared_memory_byte_size": 16}
    asked = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [2], "parameters": place}]}
    reply: httpx.Response = by.post(f"{server.url}/v2/models/item/infer", json=asked, headers=headers)
    return reply


def test_what_is_no_shared_memory_object_is_refused(server: ServerProcess, path: Path, tmp_path: Path) -> None:
    """Paths, links, pipes and folders: an error that says why, at once, and nothing is registered."""
    names = {kind: f"{path.name}-{kind}" for kind in ("link", "pipe", "folder", "none")}
    (tmp_path / "secret").write_bytes(bytes(64))
    (FOLDER / names["link"]).symlink_to(tmp_path / "secret")
    os.mkfifo(FOLDER / names["pipe"])
    (FOLDER / names["folder"]).mkdir()
    try:
        for key, status in (
            (names["link"], 422),
            (names["pipe"], 422),
            (names["folder"], 422),
            (names["none"], 404),
            (f"../..{tmp_path}/secret", 400),
            (f"/{names['folder']}/x", 400),
            ("..", 400),
            ("\0", 400),
        ):
            reply = register(server, key)
            assert (reply.status_code, bool(reply.json()["error"])) == (status, True), key
    finally:
        (FOLDER / names["link"]).unlink()
        (FOLDER / names["pipe"]).unlink()
        (FOLDER / names["folder"]).rmdir()
    assert httpx.get(f"{server.url}/v2/systemsharedmemory/status").json() == []


def test_registrations_that_cannot_be_understood_are_refused(server: ServerProcess, path: Path) -> None:
    """Bodies that are not what they should be, and numbers that make no sense."""
    for wrong, status in (
        ({"byte_size": 65}, 422),
        ({"offset": 1}, 422),
        ({"offset": 2**63}, 422),
        ({"byte_size": 0}, 400),
        ({"offset": -1}, 400),
        ({"byte_size": "64"}, 400),
        ({"byte_size": 1.5}, 400),
        ({"key": 7}, 400),
    ):
        reply = register(server, path.name, json=wrong)
        assert reply.status_code == status, (wrong, reply.text)
    url = f"{server.url}/v2/systemsharedmemory/region/a/register"
    assert httpx.post(url, content=b"{").status_code == 400
    assert httpx.post(url, content=b"x" * 100_000).status_code == 413
    assert register(server, path.name, name="x" * 81).status_code == 400
    assert httpx.get(f"{server.url}/v2/systemsharedmemory/status").json() == []


def test_a_page_or_a_proxy_does_not_reach_shared_memory(server: ServerProcess, path: Path) -> None:
    """A call by another name of this machine, from a web page or through a proxy is refused, with the reason."""
    assert register(server, path.name).status_code == 200
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"X-Forwarded-For": "10.0.0.1"}):
        for reply in (
            register(server, path.name, name="b", headers=headers),
            httpx.post(f"{server.url}/v2/systemsharedmemory/unregister", headers=headers),
            httpx.get(f"{server.url}/v2/systemsharedmemory/status", headers=headers),
            infer(server, **headers),
        ):
            assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
            assert "shared memory is accepted only from loopback" in reply.json()["error"]
    assert infer(server).json()["outputs"][0]["shape"] == [2, 4]
    httpx.post(f"{server.url}/v2/systemsharedmemory/unregister").raise_for_status()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"host": "0.0.0.0"}, "is bound to a non-loopback address"),
        ({"max-shared-memory-bytes": 0}, "max_shared_memory_bytes is 0"),
    ],
)
def test_there_is_none_where_it_must_not_be(
    store: Path, path: Path, tmp_path: Path, flags: dict[str, Any], why: str
) -> None:
    """A server that others can reach, or that is told so, refuses every use of shared memory and says why."""
    with serving(store, tmp_path / "log", **flags) as server:
        for reply in (register(server, path.name), infer(server)):
            assert (reply.status_code, why in reply.json()["error"]) == (403, True), reply.text
        lookup = httpx.post(f"{server.url}/v1/tables/item/lookup", json={"ids": [1]})
        assert lookup.json()["vectors"] == [ITEMS[1].tolist()]


def test_it_needs_the_key_that_lookups_need(store: Path, path: Path, tmp_path: Path) -> None:
    """With keys, a caller that may look up may register its memory; no admin key is needed."""
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "admin").write_text("an-admin-key")
    flags = {"api_keys_file": tmp_path / "keys", "admin_keys_file": tmp_path / "admin"}
    with serving(store, tmp_path / "log", **flags) as server:
        assert register(server, path.name).status_code == 401
        assert register(server, path.name, headers={"X-API-Key": KEY}).status_code == 200
        assert infer(server).status_code == 401
        assert infer(server, **{"X-API-Key": KEY}).status_code == 200


def test_what_one_worker_registers_every_worker_has(store: Path, path: Path, tmp_path: Path) -> None:
    """A region is known to whichever process answers, and to none of them when it is unregistered."""
    with serving(store, tmp_path / "log", workers=2) as server, ExitStack() as stack:
        server.wait_until(lambda: sum(e["event"] == "worker listening" for e in server.events()) == 2, "both workers")
        clients = [stack.enter_context(httpx.Client()) for _ in range(6)]
        assert register(server, path.name).status_code == 200
        replies = [infer(server, client) for client in clients]
        assert {reply.status_code for reply in replies} == {200}
        workers = {reply.headers["x-request-id"].partition("-")[0] for reply in replies}
        assert len(workers) == 2, "connections to both"
        path.unlink()
        assert {infer(server, client).status_code for client in clients} == {200}, "each has it open"
        httpx.post(f"{server.url}/v2/systemsharedmemory/region/a/unregister").raise_for_status()
        assert {infer(server, client).status_code for client in clients} == {404}
        server.wait_until(lambda: not _maps(server, path), "every worker to let go of the object")


def _maps(server: ServerProcess, path: Path) -> bool:
    """Whether a process of a server has an object open."""
    workers = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    files = [file for pid in workers for file in Path(f"/proc/{pid}/fd").iterdir()]
    return any(path.name in os.readlink(file) for file in files if file.is_symlink())
