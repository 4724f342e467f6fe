"""The server on a Unix-domain socket: a file that comes and goes with it, and the same calls as over TCP."""

from __future__ import annotations

import asyncio
import json
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from embstore_client import AsyncEmbeddingClient, ConnectionFailed, EmbeddingClient, Hedge, Rows
from support.serving import ServerProcess, serving

import embstore

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix-domain sockets")
NUM, DIM = 10_000, 64
LOOKUP = "/v1/tables/item/lookup"
VECTORS = np.arange(NUM * DIM, dtype=np.float32).reshape(NUM, DIM)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one table in which every number differs."""
    root = tmp_path_factory.mktemp("uds") / "store"
    opened = embstore.open_store(root)
    opened.publish("item", VECTORS)
    return root


@pytest.fixture(scope="module")
def shared(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on a socket, beyond loopback on TCP besides, for tests that leave it as it was."""
    folder = tmp_path_factory.mktemp("shared")
    flags: dict[str, Any] = {"uds": folder / "s", "port": 0, "host": "0.0.0.0", "request_seconds": 1.0}
    with serving(store, folder / "log", **flags) as running:
        yield running


def refused(store: Path, uds: Path) -> subprocess.CompletedProcess[str]:
    """What a server that cannot listen there says."""
    command = [sys.executable, "-m", "embstore", "serve", "--store", str(store), "--uds", str(uds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def addresses(server: ServerProcess) -> list[str]:
    """Where a server says that it listens."""
    return [e["address"] for e in server.events() if e["event"] == "listening"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_socket_file_lives_as_long_as_its_server(store: Path, tmp_path: Path, workers: int) -> None:
    """Only its owner may use it, everything is answered over it and nothing over TCP, SIGTERM removes it."""
    uds = tmp_path / "s"
    with serving(store, tmp_path / "log", uds=uds, workers=workers) as server, server.client() as client:
        assert addresses(server) == [f"unix://{uds}"]
        assert stat.S_IMODE(uds.stat().st_mode) == 0o600
        reply = client.post(LOOKUP, json={"ids": [3, 1]}).json()
        assert reply["vectors"] == VECTORS[[3, 1]].tolist()
        assert "embstore_table_bytes{" in client.get("/metrics").text
        assert server.stop() == 0
        assert not uds.exists()


def test_requests_are_answered_while_the_server_drains(store: Path, tmp_path: Path) -> None:
    """After SIGTERM the file stays and new connections are served, until the drain is over."""
    with serving(store, tmp_path / "log", uds=tmp_path / "s", drain_seconds=5) as server:
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: any(e["event"] == "draining" for e in server.events()), "the drain")
        with server.client() as client:
            assert client.get("/readyz").status_code == 503
        with server.client() as client:
            assert client.post(LOOKUP, json={"ids": [1]}).status_code == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_the_file_of_a_killed_server_is_replaced(store: Path, tmp_path: Path, workers: int) -> None:
    """SIGKILL leaves the file behind; the next server starts on it as if it were not there."""
    uds = tmp_path / "s"
    with serving(store, tmp_path / "log", uds=uds, workers=workers) as server:
        server.process.kill()
        server.process.wait(30)
    assert uds.is_socket()
    end = time.monotonic() + 30
    while workers > 1 and is_listened_on(uds) and time.monotonic() < end:  # workers drain when the supervisor is gone
        time.sleep(0.05)
    with serving(store, tmp_path / "log2", uds=uds, workers=workers) as server, server.client() as client:
        assert client.post(LOOKUP, json={"ids": [1]}).status_code == 200


def is_listened_on(uds: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(uds)) == 0


def test_the_socket_of_a_living_server_is_not_taken(store: Path, shared: ServerProcess) -> None:
    """A second server says so in one line and ends; the first one goes on."""
    uds = Path(shared.url.removeprefix("unix://"))
    done = refused(store, uds)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (f"embstore: cannot listen on {uds}: another server listens on this socket")
    assert "Traceback" not in done.stderr
    with shared.client() as client:
        assert client.get("/readyz").status_code == 200


def test_a_file_that_is_no_socket_is_kept(store: Path, tmp_path: Path) -> None:
    """A path that names something else is an error, and what is there stays."""
    (tmp_path / "s").write_text("mine")
    done = refused(store, tmp_path / "s")
    assert (done.returncode, "there is a file that is no socket" in done.stderr) == (1, True)
    assert (tmp_path / "s").read_text() == "mine"


def test_a_path_too_long_for_a_socket_is_an_error_of_the_settings(store: Path, tmp_path: Path) -> None:
    """The kernel's limit is said, with the path."""
    uds = tmp_path / ("x" * 108)
    done = refused(store, uds)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"embstore: uds: a socket's path has at most 107 bytes, got {uds}"


def test_permissions_can_be_widened(store: Path, tmp_path: Path) -> None:
    """`uds_mode` opens the socket to the file's group, say."""
    with serving(store, tmp_path / "log", uds=tmp_path / "s", uds_mode="660"):
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660


def test_a_port_given_besides_is_listened_on_as_well(shared: ServerProcess) -> None:
    """Both addresses answer."""
    uds, tcp = addresses(shared)
    assert (uds, tcp.startswith("http://0.0.0.0:")) == (shared.url, True)
    reply = httpx.post(f"http://127.0.0.1:{tcp.rpartition(':')[2]}{LOOKUP}", json={"ids": [1]})
    assert reply.json()["vectors"] == VECTORS[[1]].tolist()


def test_callers_on_the_socket_may_change_what_is_served(shared: ServerProcess) -> None:
    """Without admin keys they count as local, callers over TCP do not where it is open to the world; a proxy never."""
    port = addresses(shared)[1].rpartition(":")[2]
    body = {"version": 1}
    with shared.client() as client:
        assert client.put("/v1/tables/item/labels/tried", json=body).status_code == 200
        proxied = client.put("/v1/tables/item/labels/tried", json=body, headers={"x-forwarded-for": "10.0.0.1"})
        assert proxied.status_code == 403
    assert httpx.put(f"http://127.0.0.1:{port}/v1/tables/item/labels/tried", json=body).status_code == 403


def test_a_client_that_never_reads_its_reply_is_hung_up_on(shared: ServerProcess) -> None:
    """What the kernel holds for a reader counts on a Unix-domain socket too."""
    ids = np.zeros(60_000, "<i8").tobytes()
    head = f"POST {LOOKUP} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
    request = f"{head}accept: application/octet-stream\r\ncontent-length: {len(ids)}\r\n\r\n".encode() + ids
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(shared.url.removeprefix("unix://"))
        connection.sendall(request)
        hung_up = select.poll()
        hung_up.register(connection, 0)  # POLLHUP, which is always told
        assert hung_up.poll(30_000)


def check(rows: Rows, ids: Any) -> None:
    np.testing.assert_array_equal(rows.vectors, VECTORS[ids])


def test_the_clients_look_up_over_a_socket(shared: ServerProcess) -> None:
    """Sync and async, small and in several large requests, hedged, with a deadline."""
    ids = np.arange(NUM)
    options: dict[str, Any] = {"timeout_s": 20.0, "max_ids": 3_000, "hedge": Hedge(min_samples=1)}
    with EmbeddingClient(shared.url, **options) as client:
        check(client.lookup("item", ids), ids)
        check(client.lookup_many({"item": [1, 2]})["item"], [1, 2])
        assert client.ready()

    async def run() -> None:
        async with AsyncEmbeddingClient(shared.url, **options) as client:
            check(await client.lookup("item", ids), ids)
            assert [table["table"] for table in await client.tables()] == ["item"]

    asyncio.run(run())


def test_a_socket_that_is_not_there_is_a_failed_connection(tmp_path: Path) -> None:
    """Both clients name the path and say what is wrong with it."""
    said = rf"no whole answer from unix://{tmp_path}/none: .*No such file or directory"
    with EmbeddingClient(f"unix://{tmp_path}/none") as client, pytest.raises(ConnectionFailed, match=said):
        client.lookup("item", [1])

    async def run() -> None:
        async with AsyncEmbeddingClient(f"unix://{tmp_path}/none") as client:
            with pytest.raises(ConnectionFailed, match="no whole answer from unix://"):
                await client.lookup("item", [1])

    asyncio.run(run())


def test_the_command_line_looks_up_over_a_socket(shared: ServerProcess) -> None:
    """`embstore lookup --url unix:///path`."""
    command = [sys.executable, "-m", "embstore", "lookup", "item", "7", "--url", shared.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["vectors"] == VECTORS[[7]].tolist()
