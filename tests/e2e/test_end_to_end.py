"""The whole job with real processes: events on disk, training, a release, a running server, vectors over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from embstore_client import EmbeddingClient
from support.serving import ServerProcess, serving

from embstore.common.progress import make_reporter
from embstore.publish.publication import Publication
from embstore.publish.store import Store
from embstore.schemes import SCHEMES
from embstore.store.local import Release
from embstore.train.config import load_config
from embstore.train.demo import RATIO, write_demo
from embstore.train.run import train


class Keeping(Store):
    """A store that keeps what the trainer gave it to publish."""

    given: Mapping[str, Publication]

    def publish_release(self, tables: Mapping[str, Publication], **options: Any) -> Release:
        """Publish, and remember the trainer's own modules and ids."""
        self.given = tables
        return super().publish_release(tables, **options)


@pytest.fixture(scope="module")
def demo_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events with sparse 64-bit user ids and string item ids, and the config that trains on them."""
    config = write_demo(tmp_path_factory.mktemp("demo"), seed=1)
    clicks = config.parent / load_config(config).data.path
    pl.read_parquet(clicks).sample(20_000, seed=0).sort("timestamp_ms").write_parquet(clicks)
    return config


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that was there before anything was published."""
    folder = tmp_path_factory.mktemp("served")
    with serving(folder / "store", folder / "log", ready=False) as running:
        yield running


def options(scheme: str) -> list[str]:
    """One epoch of a small run of this scheme."""
    ratio = 1 if scheme == "full" else RATIO
    tables = [f"tables.{name}.{key}" for name in ("user", "item") for key in (f"scheme={scheme}", f"ratio={ratio}")]
    return [*tables, "training.max_epochs=1"]


def server_store(server: ServerProcess) -> Path:
    """The folder a server serves."""
    return server.store


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vectors_over_http_are_the_trainers(server: ServerProcess, demo_config: Path, scheme: str) -> None:
    """Trained, published, picked up while running: JSON, octet-stream and client give the module's own vectors."""
    store = Keeping(server_store(server))
    with make_reporter(silent=True) as report:
        result = train(load_config(demo_config, options(scheme)), store, report=report, device="cpu")

    def served() -> bool:
        reply = httpx.get(f"{server.url}/v1/tables")
        return {t["table"]: t["release"] for t in reply.json()["tables"]} == dict.fromkeys(store.given, result.release)

    server.wait_until(served, f"release {result.release}")
    for name, publication in store.given.items():
        assert publication.ids is not None
        keys = publication.ids.ids_of(np.arange(publication.ids.num_ids))  # type: ignore[union-attr]
        with torch.no_grad():
            expected = publication.source.eval()(torch.arange(len(keys))).numpy()
        atol = 2 * publication.source.tolerance * float(np.abs(expected).max())
        url = f"{server.url}/v1/tables/{name}/lookup"
        answer = httpx.post(url, json={"ids": [str(key) for key in keys]}, timeout=60).json()
        np.testing.assert_allclose(np.array(answer["vectors"], np.float32), expected, rtol=0, atol=atol)
        with EmbeddingClient(server.url, timeout_s=60) as client:
            rows = client.lookup(name, keys)
        assert (rows.release, rows.version, rows.missing) == (result.release, answer["version"], 0)
        np.testing.assert_allclose(rows.vectors, expected, rtol=0, atol=atol)
        if not isinstance(keys[0], str):
            octets = httpx.post(
                url, content=np.array(keys, "<i8").tobytes(), headers={"Content-Type": "application/octet-stream"}
            )
            assert octets.content == rows.vectors.tobytes()
    manifest = store.manifest("item", answer["version"] if name == "item" else store.resolve("item"))
    assert manifest.scheme == scheme
    assert manifest.metrics["ndcg@10"] == result.metrics["ndcg@10"]
    assert len(manifest.hot_ids) > 100


def test_a_trained_release_goes_live_under_load(server: ServerProcess, demo_config: Path) -> None:
    """`embstore train` as its own process, a server under load: the release is served, no request fails."""
    store = server_store(server)
    train_once = [sys.executable, "-m", "embstore", "train", str(demo_config), "--store", str(store), "--json"]
    for option in options("memcom"):
        train_once += ["--set", option]
    subprocess.run(train_once, check=True, capture_output=True, timeout=300)
    server.wait_ready()
    item = Store(store).manifest("item", Store(store).resolve("item")).hot_ids[:50]
    stop, failures, versions = threading.Event(), [], set()

    def ask() -> None:
        with EmbeddingClient(server.url, timeout_s=30) as client:
            while not stop.is_set():
                try:
                    versions.add(client.lookup("item", item).version)
                except Exception as error:
                    failures.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    subprocess.run(train_once, check=True, capture_output=True, timeout=300)
    published = Store(store).resolve("item")
    server.wait_until(lambda: published in versions, "the new release")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []


def test_readme_lookup_works_on_the_command_line(server: ServerProcess, demo_config: Path) -> None:
    """`embstore lookup` asks the running server and prints vectors."""
    server.wait_ready()
    store = server_store(server)
    key = str(Store(store).manifest("item", Store(store).resolve("item")).hot_ids[0])
    command = [sys.executable, "-m", "embstore", "lookup", "item", key, "sku-nobody", "--url", server.url]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert key in shown
    assert "no" in shown


def test_one_command_trains_publishes_and_serves_a_scheme(tmp_path: Path) -> None:
    """`embstore demo --scheme NAME`: from nothing to vectors over HTTP; the curl lines it prints name the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "embstore", "demo", "--folder", str(tmp_path), "--scheme", "low_rank"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, cwd=tmp_path)
        try:
            deadline = time.monotonic() + 120
            while not _ready(port):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            store = Store(tmp_path / "low_rank" / "store")
            table = store.load("item")
            key = store.manifest("item", 1).hot_ids[0]
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/tables/item/lookup", json={"ids": [key]}).json()
            np.testing.assert_array_equal(np.array(answer["vectors"], np.float32), table.lookup([key]))
            assert table.scheme.name == "low_rank"
        finally:
            process.terminate()
            process.wait(30)
    assert f"http://127.0.0.1:{port}/v1/tables/item/lookup" in (tmp_path / "log").read_text()


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False
