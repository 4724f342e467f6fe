"""A server in mixed traffic for a while: good clients, bad ones, new versions. Nothing grows, nothing slows down.

EMBSTORE_SOAK_SECONDS says for how long; ten minutes by hand, and from two on latencies are compared as well.
"""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from support.hostile import Wire, lookup, octets, open_files, request, settles
from support.serving import ServerProcess, serving

import embstore

SECONDS = float(os.environ.get("EMBSTORE_SOAK_SECONDS", "8"))
NUM, DIM = 2000, 16


def release(value: int) -> dict[str, embstore.Publication]:
    """Two tables in which every number is `value`: a vector tells its version."""
    return {name: embstore.Publication(np.full((NUM, DIM), value, np.float32)) for name in ("user", "item")}


class Traffic:
    """Threads that each do one kind of thing until told to stop."""

    def __init__(self, server: ServerProcess, store: embstore.Store) -> None:
        self.server, self.store = server, store
        self.problems: list[str] = []
        self.seconds: list[tuple[float, float]] = []
        self.published = 1
        self.chance = random.Random(0)
        self.seen: set[int] = set()
        self._began = time.monotonic()
        self._stop = threading.Event()
        kinds = (self._octets, self._json, self._many, self._hostile, self._probe, self._publish)
        self._threads = [threading.Thread(target=self._repeat, args=(kind,), name=kind.__name__) for kind in kinds]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _repeat(self, kind: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                kind()
            except (AssertionError, OSError, LookupError, ValueError) as error:
                self.problems.append(f"{kind.__name__}: {error!r}")
                self._stop.wait(0.1)

    def _octets(self) -> None:
        """A connection's life: some lookups of different sizes, timed."""
        with Wire(self.server) as wire:
            for _ in range(self.chance.randrange(1, 200)):
                count = self.chance.choice((1, 10, 100, 1000))
                begin = time.monotonic()
                answer = wire.send(lookup([self.chance.randrange(NUM)] * count)).answer()
                now = time.monotonic()
                version = int(answer.headers["x-embedding-version"])
                assert answer.body == np.full(count * DIM, version, "<f4").tobytes(), "not this version's vectors"
                self.seen.add(version)
                self.seconds.append((now - self._began, now - begin))

    def _json(self) -> None:
        """Lookups in JSON, some with bags and missing ids."""
        bodies: tuple[dict[str, Any], ...] = (
            {"ids": [1, NUM + 5]},
            {"ids": [1, 2, 3], "offsets": [0, 2], "pooling": "mean"},
            {"ids": []},
        )
        with Wire(self.server) as wire:
            for _ in range(20):
                body = orjson.dumps(self.chance.choice(bodies))
                sent = request("POST", "/v1/tables/user/lookup", body, Content_Type="application/json")
                answer = orjson.loads(wire.send(sent).answer().body)
                for row, found in zip(answer["vectors"], answer.get("found", [True] * 3), strict=False):
                    assert set(row) == {float(answer["version"]) if found else 0.0}

    def _many(self) -> None:
        """Two tables at once, never of two releases."""
        body = orjson.dumps({"tables": {"user": {"ids": [1]}, "item": {"ids": [2]}}})
        with Wire(self.server) as wire:
            for _ in range(20):
                sent = request("POST", "/v1/lookup", body, Content_Type="application/json")
                answer = orjson.loads(wire.send(sent).answer().body)
                values = {table["vectors"][0][0] for table in answer["tables"].values()}
                assert values == {float(answer["release"])}

    def _hostile(self) -> None:
        """Something no good client does."""
        whole = lookup([self.chance.randrange(NUM) for _ in range(self.chance.randrange(1, 3000))])
        path = "/v1/tables/item/lookup"
        match self.chance.randrange(8):
            case 0:
                Wire(self.server).send(whole[: self.chance.randrange(len(whole))]).close()
            case 1:
                Wire(self.server).send(whole[: self.chance.randrange(len(whole))]).reset()
            case 2:
                Wire(self.server).send(whole * 20).reset()
            case 3:
                with Wire(self.server) as wire:
                    assert wire.send(self.chance.randbytes(300), b"\r\n\r\n").answer().status == 400
            case 4:
                with Wire(self.server) as wire:
                    sent = request(
                        "POST", path, octets([1, 2]), Content_Type="application/octet-stream", Content_Length=-1
                    )
                    assert wire.send(sent).answer().status == 400
            case 5:
                with Wire(self.server) as wire:
                    for body in (b'{"ids": [', b'{"ids": [1.5]}', b"[" * 10_000, self.chance.randbytes(100)):
                        sent = request("POST", path, body, Content_Type="application/json")
                        assert wire.send(sent).answer().status == 400
            case 6:
                with Wire(self.server) as wire:
                    for name in ("nothing", f"t{self.chance.random()}", "%00", "a" * 3000):
                        assert wire.send(lookup([1], name)).answer().status == 404
            case 7:
                with Wire(self.server) as wire:
                    wire.try_send(b"GET / HTTP/1.1\r\n" + b"X-A: %s\r\n" % (b"a" * 100) * 2000 + b"\r\n")
                    assert wire.answer().status in (400, 431)
        self._stop.wait(0.01)

    def _probe(self) -> None:
        """What an orchestrator and Prometheus ask."""
        with Wire(self.server) as wire:
            for path in ("/livez", "/readyz", "/metrics", "/v1/tables", "/v1/tables/item/versions"):
                assert wire.send(request("GET", path)).answer().status == 200
        self._stop.wait(0.2)

    def _publish(self) -> None:
        """A new release every half second; every third is rolled back."""
        self._stop.wait(0.5)
        self.published += 1
        self.store.publish_release(release(self.published))
        if self.published % 3 == 0:
            before = self.store.survey().releases[str(self.published - 1)]
            for name, version in before.tables.items():
                self.store.set_label(name, "latest", version, release=before.id)


def test_nothing_grows_and_nothing_slows_down(tmp_path: Path) -> None:
    """After a warm-up memory, descriptors and latencies stay where they are, and every answer is right."""
    store = embstore.open_store(tmp_path / "store")
    store.publish_release(release(1))
    with serving(tmp_path / "store", tmp_path / "log") as server:
        files = open_files(server)
        with Traffic(server, store) as traffic:
            time.sleep(SECONDS * 0.4)
            warm_mib = max(_memories(server))
            time.sleep(SECONDS * 0.6)
            assert server.process.poll() is None
        assert traffic.problems == []
        late_mib = min(_memories(server))
        assert late_mib < warm_mib * 1.1 + 24, f"{warm_mib:.0f} MiB became {late_mib:.0f}"
        assert settles(lambda: open_files(server), files + 4), f"{files} files became {open_files(server)}"
        assert len(traffic.seen) > SECONDS / 4
        if SECONDS >= 120:  # less says nothing about latency, least of all beside other tests
            early = [seconds for at, seconds in traffic.seconds if at < SECONDS * 0.4]
            late = [seconds for at, seconds in traffic.seconds if at > SECONDS * 0.7]
            for of in (statistics.median, _p99):
                assert of(late) < 5 * of(early) + 0.02, f"{of(early):.4f} s became {of(late):.4f}"
        failures = [event for event in server.events() if event.get("level") == "error"]
        assert failures == []
        assert "Traceback" not in server.log_path.read_text()
        assert server.stop() == 0


def _memories(server: ServerProcess) -> list[float]:
    """Memory in use, looked at for a moment."""
    found = []
    for _ in range(10):
        found.append(server.memory_mib())
        time.sleep(0.1)
    return found


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]
